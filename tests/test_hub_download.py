"""One law: whatever the server does, the file is whole and right, or it is not there."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from model_server import Answer, ModelServer, in_turn, serve, serving, status

from realm_jax.errors import RequestError
from realm_jax.hub import download
from realm_jax.hub.download import Expected, Unavailable
from realm_jax.hub.progress import Arrival

DATA = bytes(range(256)) * 4000  # 1 MB
OTHER = bytes(len(DATA))
RIGHT = Expected(len(DATA), hashlib.sha256(DATA).hexdigest())
PATH = "/model.gguf"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF", 0.001)
    monkeypatch.setenv("REALM_DOWNLOAD_TIMEOUT", "0.3")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with serving() as state:
        yield state


def fetch(server: ModelServer, target: Path, answer: Answer, expected: Expected = RIGHT) -> None:
    server.answers[PATH] = answer
    download.fetch(server.url + PATH, target, Arrival("model.gguf", show=False), expected)


@pytest.mark.parametrize(
    "answer",
    [
        serve(DATA),
        serve(DATA, length=False),
        in_turn(serve(DATA, cut=300_000), serve(DATA, cut=1), serve(DATA)),
        in_turn(serve(DATA, cut=300_000), serve(DATA, ranges=False)),
        in_turn(serve(DATA, cut=300_000, length=False), serve(DATA)),
        in_turn(serve(DATA, cut=300_000, pause=0.6), serve(DATA)),
        in_turn(status(503), status(429), serve(DATA)),
        in_turn(serve(OTHER, cut=300_000), serve(DATA)),
        in_turn(status(206, Content_Range="bytes 7-9/10"), serve(DATA)),
    ],
    ids=[
        "plain",
        "no-length",
        "cut-twice",
        "no-ranges",
        "cut-no-length",
        "stall",
        "busy",
        "replaced",
        "wrong-range",
    ],
)
def test_the_file_arrives_whole(server: ModelServer, tmp_path: Path, answer: Answer):
    fetch(server, tmp_path / "model.gguf", answer)
    assert (tmp_path / "model.gguf").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (serve(OTHER), "sha256 is"),
        (serve(DATA[:-1]), "offers 1,023,999 bytes, expected 1,024,000"),
        (serve(DATA + b"!", length=False), "more than 1,024,000 bytes"),
        (serve(DATA, cut=0), "closed at 0 of 1,024,000 bytes (after 4 attempts)"),
        (serve(DATA, cut=0, pause=0.6), "no data for 0.3 s (after 4 attempts)"),
        (status(404), "HTTP 404: Not Found"),
        (status(403, X_Error_Message="ask\x1b[31m first"), "HTTP 403: ask [31m first"),
        (status(500), "HTTP 500"),
        (status(302, Location="file:///etc/passwd"), "HTTP 302"),
    ],
    ids=["lie", "short", "long", "cut", "stall", "missing", "forbidden", "broken", "redirect"],
)
def test_no_wrong_file_gets_the_name(server: ModelServer, tmp_path: Path, answer: Answer, reason: str):
    with pytest.raises(Unavailable) as failure:
        fetch(server, tmp_path / "model.gguf", answer)
    assert reason in str(failure.value)
    assert str(failure.value).isprintable()
    assert not (tmp_path / "model.gguf").exists()


def test_a_lie_leaves_nothing_behind(server: ModelServer, tmp_path: Path):
    with pytest.raises(Unavailable):
        fetch(server, tmp_path / "model.gguf", serve(OTHER))
    assert list(tmp_path.iterdir()) == []


def test_no_byte_is_sent_twice(server: ModelServer, tmp_path: Path):
    fetch(
        server,
        tmp_path / "model.gguf",
        in_turn(serve(DATA, cut=300_000), serve(DATA, cut=200_000), serve(DATA)),
    )
    assert server.sent(PATH) == [300_000, 200_000, len(DATA) - 500_000]


def test_a_later_call_goes_on_where_the_first_broke_off(server: ModelServer, tmp_path: Path):
    with pytest.raises(Unavailable):
        fetch(server, tmp_path / "model.gguf", in_turn(serve(DATA, cut=300_000), status(404)))
    fetch(server, tmp_path / "model.gguf", serve(DATA))
    assert server.sent(PATH) == [300_000, 0, len(DATA) - 300_000]
    assert (tmp_path / "model.gguf").read_bytes() == DATA


@pytest.mark.parametrize(
    "left", [OTHER[:1000], DATA, DATA + b"more", OTHER], ids=["old", "all", "longer", "other"]
)
@pytest.mark.parametrize("expected", [RIGHT, Expected()], ids=["known", "announced"])
def test_what_was_left_behind_does_no_harm(
    server: ModelServer, tmp_path: Path, left: bytes, expected: Expected
):
    (tmp_path / "model.gguf.part").write_bytes(left)
    fetch(server, tmp_path / "model.gguf", serve(DATA, linked=True), expected)
    assert (tmp_path / "model.gguf").read_bytes() == DATA


def test_two_halves_are_not_joined_unverified(server: ModelServer, tmp_path: Path):
    (tmp_path / "model.gguf.part").write_bytes(OTHER[:1000])
    fetch(server, tmp_path / "model.gguf", serve(DATA), Expected())
    assert (tmp_path / "model.gguf").read_bytes() == DATA


def test_the_announced_checksum_counts(server: ModelServer, tmp_path: Path):
    server.answers["/store"] = serve(OTHER)
    redirect = status(302, Location="/store", X_Linked_ETag=f'"{RIGHT.sha256}"')
    with pytest.raises(Unavailable, match="sha256 is"):
        fetch(server, tmp_path / "model.gguf", redirect, Expected())


def test_a_token_stays_with_its_server(server: ModelServer, tmp_path: Path):
    with serving() as store:
        store.answers[PATH] = serve(DATA)
        server.answers["/moved"] = status(307, Location=PATH)
        server.answers[PATH] = status(302, Location=store.url + PATH)
        token = {"Authorization": "Bearer secret"}
        download.fetch(
            server.url + "/moved", tmp_path / "model.gguf", Arrival("model", show=False), RIGHT, token
        )
        assert [visit.headers.get("Authorization") for visit in server.visits] == ["Bearer secret"] * 2
        assert [visit.headers.get("Authorization") for visit in store.visits] == [None]


def test_a_password_in_the_address_is_sent_and_not_shown(server: ModelServer, tmp_path: Path):
    url = server.url.replace("//", "//me:pass%20word@")
    with pytest.raises(Unavailable) as failure:
        download.fetch(url + PATH, tmp_path / "model.gguf", Arrival("model", show=False), RIGHT)
    assert server.visits[0].headers["Authorization"] == "Basic bWU6cGFzcyB3b3Jk"
    assert "pass" not in str(failure.value)


def test_a_closed_port_is_reported_at_once(tmp_path: Path):
    with serving() as server:
        url = server.url
    start = time.monotonic()
    with pytest.raises(Unavailable, match=r"cannot reach 127\.0\.0\.1"):
        download.fetch(url + PATH, tmp_path / "model.gguf", Arrival("model", show=False), RIGHT)
    assert time.monotonic() - start < 1


def test_a_full_disk_is_seen_before_the_download(
    server: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(Unavailable, match=r"needs 1\.0 MB; .* has 1\.0 MB free"):
        fetch(server, tmp_path / "model.gguf", serve(DATA))


def test_a_page_is_bounded(server: ModelServer):
    server.answers["/page"] = serve(b"x" * 1001)
    with pytest.raises(Unavailable, match="longer than"):
        download.read(server.url + "/page", accept="text/html", limit=1000)


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_timeout_is_a_number_of_seconds(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("REALM_DOWNLOAD_TIMEOUT", text)
    with pytest.raises(RequestError, match=f"REALM_DOWNLOAD_TIMEOUT is '{text}'"):
        download.timeout()


@pytest.mark.parametrize("show", [True, None])
def test_arrival_is_seen_on_stderr_alone(capsys: pytest.CaptureFixture[str], show: bool | None):
    with Arrival("model.gguf", show) as arrival:
        arrival.at(5, 10)
        arrival.note("a note [not markup]")
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.gguf" in err
    assert "a note [not markup]" in err
