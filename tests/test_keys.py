"""API keys: who has one is let in, at once and until it is revoked; the file gives none away."""

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from realm_jax.errors import AuthenticationError, KeyFileError, RequestError
from realm_jax.serving import keys
from realm_jax.serving.keys import REMEMBERED_S, KeyStore


class Clock:
    """Seconds, for both of a store's clocks."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


@pytest.fixture
def store(path: Path, clock: Clock) -> Iterator[KeyStore]:
    with KeyStore(path, wall=clock, clock=clock) as store:
        yield store


@pytest.fixture
def hashes(monkeypatch: pytest.MonkeyPatch) -> mock.Mock:
    """Counts the slow hashes."""
    counted = mock.Mock(side_effect=keys._hash)
    monkeypatch.setattr(keys, "_hash", counted)
    return counted


def changed(text: str, at: int) -> str:
    return text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :]


def test_a_key_opens_what_it_was_made_for(store: KeyStore):
    first, second = store.create("a", "laptop"), store.create("b")
    assert store.verify(first.text) == first.key and store.verify(second.text).tenant == "b"
    assert [key.id for key in store.all()] == sorted((first.key.id, second.key.id))
    assert len(first.text) == 83 and first.text != second.text


def test_whatever_is_not_the_key_is_refused_in_the_same_words_and_with_the_same_work(
    store: KeyStore, hashes: mock.Mock
):
    """An id that is not there costs the hash that a wrong secret costs: neither can be told by the time."""
    text = store.create("a").text
    hashes.reset_mock()
    said = set()
    for wrong in (changed(text, 6), changed(text, 17), changed(text, 19), changed(text, 82)):
        with pytest.raises(AuthenticationError) as caught:
            store.verify(wrong)
        said.add(str(caught.value))
        assert hashes.call_count == 1
        hashes.reset_mock()
    assert len(said) == 1
    for wrong in ("", text[:-1], text + "0", text.upper(), "Bearer " + text, text + "\n", "x" * 10**6, "ä"):
        with pytest.raises(AuthenticationError, match="has not the form realm-ID-SECRET"):
            store.verify(wrong)
    assert not hashes.call_count


def test_the_slow_hash_is_computed_once_and_again_after_a_while(
    store: KeyStore, clock: Clock, hashes: mock.Mock
):
    text = store.create("a").text
    hashes.reset_mock()
    for _ in range(5):
        store.verify(text)
    assert hashes.call_count == 1
    clock.now += REMEMBERED_S + 1
    store.verify(text)
    assert hashes.call_count == 2


def test_only_so_many_are_remembered(store: KeyStore, monkeypatch: pytest.MonkeyPatch, hashes: mock.Mock):
    monkeypatch.setattr(keys, "REMEMBERED", 2)
    texts = [store.create("a").text for _ in range(3)]
    for text in texts:
        store.verify(text)
    hashes.reset_mock()
    store.verify(texts[2])
    assert hashes.call_count == 0
    store.verify(texts[0])
    assert hashes.call_count == 1


def test_what_another_process_does_counts_at_the_next_request(store: KeyStore, path: Path, clock: Clock):
    """Another connection stands for the other process; the store has the key in memory."""
    with KeyStore(path, wall=clock) as other:
        made = other.create("a")
        store.verify(made.text)
        store.verify(made.text)
        assert other.revoke(made.key.id) == made.key
        with pytest.raises(AuthenticationError, match="unknown, revoked or expired"):
            store.verify(made.text)
        clock.now += 60
        again = other.revoke(made.key.id)
        assert again.revoked == clock.now - 60 and store.all() == [again]  # the first time stands


def test_what_is_remembered_is_of_the_row_that_stands_there(store: KeyStore, path: Path):
    made = store.create("a")
    store.verify(made.text)
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE keys SET hash = ?", (b"x" * 32,))
    connection.close()
    with pytest.raises(AuthenticationError, match="unknown, revoked or expired"):
        store.verify(made.text)


def test_a_key_expires(store: KeyStore, clock: Clock):
    made = store.create("a", expires_s=60)
    store.verify(made.text)
    clock.now += 59
    store.verify(made.text)
    clock.now += 1
    with pytest.raises(AuthenticationError, match="unknown, revoked or expired"):
        store.verify(made.text)


def test_the_file_and_what_is_printed_of_a_key_do_not_have_it(store: KeyStore, path: Path):
    made = store.create("tenant-a", "laptop")
    secret = made.text.split("-")[2]
    store.verify(made.text)
    shown = f"{made!r} {made.key!r} {store!r} {store.all()!r}"
    assert secret not in shown and made.text not in shown
    for file in path.parent.iterdir():
        data = file.read_bytes()
        assert secret.encode() not in data and bytes.fromhex(secret) not in data
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with pytest.raises(RequestError) as caught:
        store.revoke(made.text)  # a whole key, by mistake
    assert secret not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o666])
def test_a_file_that_is_open_to_others_is_refused(path: Path, mode: int):
    KeyStore(path).close()
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"is open to others \(mode {mode:o}\); chmod 600"):
        KeyStore(path)


def test_a_folder_that_others_may_write_into_is_refused(tmp_path: Path):
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(KeyFileError, match="others may write into its folder"):
        KeyStore(folder / "keys.sqlite")


def test_another_users_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch):
    KeyStore(path).close()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        KeyStore(path)


def test_what_is_no_file_of_keys_is_refused_and_left_as_it_was(tmp_path: Path):
    text, other, folder = tmp_path / "text", tmp_path / "other.sqlite", tmp_path / "folder"
    text.write_bytes(b"tenants and their keys\n" * 200)
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE keys (id TEXT, tenant TEXT)")
    connection.close()
    folder.mkdir(mode=0o700)
    for path in (text, other):
        path.chmod(0o600)
        before = path.read_bytes()
        with pytest.raises(KeyFileError, match="name another"):
            KeyStore(path)
        assert path.read_bytes() == before
    with pytest.raises(KeyFileError, match="is not a file"):
        KeyStore(folder)
    with pytest.raises(KeyFileError, match="name a file that can be written"):
        KeyStore(text / "below")


def test_a_file_that_was_cut_is_named(store: KeyStore, path: Path):
    store.create("a")
    store.close()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(KeyFileError, match=r"keys\.sqlite: .*; if it is damaged"), KeyStore(path) as cut:
        cut.all()


@pytest.mark.parametrize(
    ("tenant", "label", "seconds"),
    [("", "", 9), ("a b", "", 9), ("a", "x" * 65, 9), ("a", "\x1b[2J", 9), ("a", "", 0), ("a", "", 10**12)],
)
def test_a_bad_key_is_not_made(store: KeyStore, tenant: str, label: str, seconds: int):
    with pytest.raises(RequestError, match=r"^(name|label|expires) is "):
        store.create(tenant, label, seconds)
    assert store.all() == []


def test_a_full_file_takes_no_more(store: KeyStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keys, "MAX_KEYS", 1)
    store.create("a")
    with pytest.raises(RequestError, match="has 1 keys, which is the most"):
        store.create("a")


def test_many_threads_and_two_stores_at_once(store: KeyStore, path: Path):
    made: list[str] = []

    def work(which: KeyStore) -> None:
        for _ in range(3):
            key = which.create("a")
            assert which.verify(key.text) == key.key
            made.append(key.key.id)

    with KeyStore(path) as other:
        threads = [threading.Thread(target=work, args=(each,)) for each in (store, other) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 12 and {key.id for key in store.all()} == set(made)
