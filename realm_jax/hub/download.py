"""One file over HTTP: resumed, retried, bounded in time and size, verified.

After `fetch` the target is whole and has the expected checksum, or it is not there and `Unavailable`
says why in one line. What arrived so far waits in ``<target>.part`` for the next try.
"""

import base64
import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import realm_jax
from realm_jax.errors import RequestError
from realm_jax.hub.progress import Arrival, megabytes

ATTEMPTS = 4
BACKOFF = 0.5  # seconds before the second attempt; doubled before each further one
CHUNK = 1 << 18
RANGE_REFUSED = 416
WORTH_RETRYING = {408, 425, 429, 500, 502, 503, 504}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Expected:
    """What a file must be; None where nobody said."""

    size: int | None = None  # bytes
    sha256: str | None = None  # hexadecimal


class Unavailable(Exception):
    """A source does not give the file; the message is the reason, in one line."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status  # of the HTTP answer, if there was one


class Interrupted(Unavailable):
    """The same, for a reason that another attempt may mend."""


def timeout() -> float:
    """Seconds without a byte after which a server counts as stalled: REALM_DOWNLOAD_TIMEOUT, default 15."""
    text = os.environ.get("REALM_DOWNLOAD_TIMEOUT", "15")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise RequestError(f"REALM_DOWNLOAD_TIMEOUT is {text!r}; it is a number of seconds above 0")
    return seconds


def fetch(
    url: str,
    target: Path,
    arrival: Arrival,
    expected: Expected,
    headers: Mapping[str, str] | None = None,
) -> None:
    """The target holds the whole file, as expected.

    Without a checksum, the one that Hugging Face announces in ``X-Linked-ETag`` is used. ``headers``
    go to the server of ``url`` alone, not to where it redirects. Raises `Unavailable`.
    """
    part = _part(target)
    retried(lambda: _transfer(url, part, arrival, headers or {}, expected), arrival.note)
    part.replace(target)


def discard(target: Path) -> None:
    """No unfinished download of the target is left."""
    _part(target).unlink(missing_ok=True)


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def read(url: str, *, accept: str, limit: int) -> tuple[bytes, str, str]:
    """Body, content type and final address of a page of at most ``limit`` bytes. Raises `Unavailable`."""

    def page() -> tuple[bytes, str, str]:
        with _open(url, {"Accept": accept}, {}) as (response, _):
            body = response.read(limit + 1)
            if len(body) > limit:
                raise Unavailable(f"the answer is longer than {megabytes(limit)}")
            return body, response.headers.get_content_type(), response.geturl()

    return retried(page)


def verify(path: Path, sha256: str) -> None:
    """The file has this checksum; otherwise it is removed and `Unavailable` raised."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        path.unlink()
        raise Unavailable(f"wrong file: its sha256 is {found}, expected {sha256}")


def retried(attempt: Callable[[], Result], note: Callable[[str], None] | None = None) -> Result:
    """What ``attempt`` returns, the first time that it is not interrupted; `Unavailable` after the last."""
    for count in range(1, ATTEMPTS):
        try:
            return attempt()
        except Interrupted as reason:
            if note:
                note(f"{reason}; trying again")
            time.sleep(BACKOFF * 2 ** (count - 1))
    try:
        return attempt()
    except Interrupted as reason:
        raise Unavailable(f"{reason} (after {ATTEMPTS} attempts)") from reason


def _transfer(url: str, part: Path, arrival: Arrival, headers: Mapping[str, str], expected: Expected) -> None:
    """``part`` is whole and verified. Raises `Interrupted` with what has arrived kept in it."""
    have = part.stat().st_size if part.exists() else 0
    wanted = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        with _open(url, wanted, headers) as (response, linked):
            sha256 = expected.sha256 or linked
            start = _start(response, have)
            if start and sha256 is None:
                raise Interrupted("nothing tells whether both halves are of one file", RANGE_REFUSED)
            total = _total(response, start, expected.size)
            done = _write(response, part, start, total, arrival)
    except Unavailable as reason:
        if reason.status == RANGE_REFUSED:  # what we have is too long, or of another file
            part.unlink(missing_ok=True)
            raise Interrupted(f"{reason}; starting anew") from reason
        raise
    if done < (total or 0):
        raise Interrupted(f"the connection closed at {done:,} of {total:,} bytes")
    if sha256:
        _verify_transfer(part, sha256, resumed=start > 0)


def _total(response: http.client.HTTPResponse, start: int, expected: int | None) -> int | None:
    """The length of the whole file, by the server's word or by what is expected; they agree."""
    length = response.headers.get("Content-Length", "")
    if not length.isdecimal():
        return expected
    total = start + int(length)
    if expected is not None and total != expected:
        raise Unavailable(f"the server offers {total:,} bytes, expected {expected:,}")
    return total


def _start(response: http.client.HTTPResponse, have: int) -> int:
    """The offset of the first byte of the body: ``have``, or 0 from a server that ignores Range."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return 0
    said = response.headers.get("Content-Range", "")
    if not (have and said.startswith(f"bytes {have}-")):
        raise Interrupted(f"asked for bytes from {have:,}, was sent {_plain(said)!r}", RANGE_REFUSED)
    return have


def _write(
    response: http.client.HTTPResponse, part: Path, start: int, total: int | None, arrival: Arrival
) -> int:
    """The length of ``part`` once the body is written at ``start``, never above total or the disk's room."""
    room = shutil.disk_usage(part.parent).free
    if total is not None and total - start > room:
        raise Unavailable(f"needs {megabytes(total - start)}; {part.parent} has {megabytes(room)} free")
    limit = start + room if total is None else total
    done = start
    with part.open("r+b" if start else "wb") as file:
        file.seek(start)
        arrival.at(done, total)
        while chunk := response.read1(CHUNK):
            done += len(chunk)
            if done > limit:
                raise Unavailable(f"the server sends more than {limit:,} bytes")
            file.write(chunk)
            arrival.at(done, total)
        file.flush()
        os.fsync(file.fileno())  # before the rename that makes it count
    return done


def _verify_transfer(part: Path, sha256: str, *, resumed: bool) -> None:
    try:
        verify(part, sha256)
    except Unavailable as reason:
        # The first half may be old: a file fetched whole decides.
        raise (Interrupted(str(reason)) if resumed else reason) from reason


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; remembers Hugging Face's checksum; credentials stay with their server."""

    linked: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.linked = linked_sha256(headers) or self.linked
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is None:
            return None
        if req.type == "https" and new.type != "https":
            raise urllib.error.URLError("redirected from https to plain http")
        if (new.type, new.host) == (req.type, req.host):
            new.unredirected_hdrs.update(req.unredirected_hdrs)
        return new


def linked_sha256(headers: Message) -> str | None:
    """The sha256 in ``X-Linked-ETag``; None where the header is missing or something else."""
    found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag") or "")
    return found and found[1]


@contextmanager
def _open(
    url: str, headers: Mapping[str, str], private: Mapping[str, str]
) -> Iterator[tuple[http.client.HTTPResponse, str | None]]:
    """The response and the checksum announced on the way; every failure inside is `Unavailable`."""
    redirects = _Redirects()
    try:
        opener = urllib.request.build_opener(redirects, urllib.request.HTTPSHandler(context=_certificates()))
        with opener.open(_request(url, headers, private), timeout=timeout()) as response:
            yield response, linked_sha256(response.headers) or redirects.linked
    except urllib.error.HTTPError as error:
        with error:
            detail = error.headers.get("X-Error-Message") or error.reason
            kind = Interrupted if error.code in WORTH_RETRYING else Unavailable
            raise kind(f"HTTP {error.code}: {_plain(detail)}", error.code) from error
    except urllib.error.URLError as error:
        raise _unreachable(urlsplit(url).hostname, error.reason) from error
    except TimeoutError as error:
        raise Interrupted(f"no data for {timeout():g} s") from error
    except (ConnectionError, http.client.HTTPException, ssl.SSLError) as error:
        raise Interrupted(f"the connection broke: {_plain(error) or type(error).__name__}") from error


def _request(url: str, headers: Mapping[str, str], private: Mapping[str, str]) -> urllib.request.Request:
    """A GET; ``user:password@`` in the address becomes a private header."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise Unavailable(f"only http and https are fetched, not {parts.scheme}:")
    if parts.username is not None:
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        private = {"Authorization": "Basic " + base64.b64encode(user.encode()).decode(), **private}
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    request = urllib.request.Request(
        url, headers={"User-Agent": f"realm-jax/{realm_jax.__version__}", **headers}
    )
    for name, value in private.items():
        request.add_unredirected_header(name, value)
    return request


def _certificates() -> ssl.SSLContext:
    """The system's certificates (SSL_CERT_FILE included) and those that requests or pip are told to use."""
    context = ssl.create_default_context()
    for name in ("REQUESTS_CA_BUNDLE", "PIP_CERT"):
        if (bundle := os.environ.get(name)) and Path(bundle).is_file():
            context.load_verify_locations(cafile=bundle)
    return context


def _unreachable(host: str | None, reason: object) -> Unavailable:
    """Why there is no connection. None of these is worth a second attempt before the next source."""
    match reason:
        case socket.gaierror():
            return Unavailable(f"cannot resolve {host}")
        case TimeoutError():
            return Unavailable(f"{host} does not answer within {timeout():g} s")
        case ssl.SSLCertVerificationError():
            return Unavailable(f"the certificate of {host} is not trusted (set SSL_CERT_FILE)")
        case _:
            return Unavailable(f"cannot reach {host}: {_plain(reason)}")


def _plain(text: object) -> str:
    """One printable line of at most 200 characters: servers' words go to a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:200].strip()
