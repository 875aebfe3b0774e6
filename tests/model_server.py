"""An HTTP server on this machine that plays Hugging Face or a package index, honest or not."""

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], int]  # writes the answer; returns how many bytes of body it sent


@dataclass
class Visit:
    path: str
    headers: dict[str, str]
    sent: int = 0
    finished: threading.Event = field(default_factory=threading.Event)


@dataclass
class ModelServer:
    """Answers by path; each visit is recorded with the bytes of body that it got."""

    port: int
    answers: dict[str, Answer] = field(default_factory=dict)
    visits: list[Visit] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sent(self, path: str) -> list[int]:
        """Bytes of body sent at each visit of the path."""
        return [visit.sent for visit in self.visits if visit.path == path and visit.finished.wait(10)]


@contextmanager
def serving() -> Iterator[ModelServer]:
    """A server of no pages at all, until the test adds some."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            visit = Visit(self.path, dict(self.headers))
            state.visits.append(visit)
            with suppress(ConnectionError):  # a client that has seen enough hangs up
                visit.sent = state.answers.get(self.path, status(404))(self)
            visit.finished.set()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = ModelServer(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def status(code: int, **headers: str) -> Answer:
    """Only a status line and these headers (``_`` stands for ``-``)."""

    def answer(request: BaseHTTPRequestHandler) -> int:
        request.send_response(code)
        for name, value in ({"Content_Length": "0"} | headers).items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        return 0

    return answer


def serve(
    data: bytes,
    *,
    kind: str = "application/octet-stream",
    ranges: bool = True,
    length: bool = True,
    cut: int | None = None,
    pause: float = 0.0,
    linked: bool = False,
) -> Answer:
    """The data; from the asked offset where ``ranges``.

    ``cut``: sends so many bytes, waits ``pause`` seconds and closes. ``linked``: announces the checksum
    as Hugging Face does. ``length``: says how long the body is.
    """

    def answer(request: BaseHTTPRequestHandler) -> int:
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range") or "")
        start = int(asked[1]) if asked and ranges else 0
        if start >= len(data) > 0:
            return status(416)(request)
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        if length:
            request.send_header("Content-Length", str(len(data) - start))
        if linked:
            request.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        request.send_header("Content-Type", kind)
        request.end_headers()
        body = data[start:] if cut is None else data[start : start + cut]
        request.wfile.write(body)
        request.wfile.flush()
        time.sleep(pause)
        return len(body)

    return answer


def in_turn(*answers: Answer) -> Answer:
    """Each answer once, then the last one for ever."""
    left = list(answers)

    def answer(request: BaseHTTPRequestHandler) -> int:
        now = left.pop(0) if len(left) > 1 else left[0]
        return now(request)

    return answer


def wheel_of(members: dict[str, bytes]) -> bytes:
    """A wheel, as far as zip is concerned, with these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def index_json(*links: str) -> Answer:
    """A package's page in PEP 691's form."""
    files = [{"filename": link.rpartition("/")[2], "url": link, "hashes": {}} for link in links]
    page = json.dumps({"meta": {"api-version": "1.1"}, "name": "package", "files": files})
    return serve(page.encode(), kind="application/vnd.pypi.simple.v1+json")


def index_html(*links: str) -> Answer:
    """A package's page in PEP 503's form."""
    page = "".join(f'<a class="x" href="{link}">file</a><br>' for link in links)
    return serve(f"<!DOCTYPE html><html><body>{page}</body></html>".encode(), kind="text/html")
