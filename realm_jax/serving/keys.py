"""API keys in a SQLite file: created and revoked by one process while another serves.

A key is `realm-<id>-<secret>`: the id finds its row, the secret is 256 random bits, of which the file has
only a hash (scrypt, RFC 7914). What was verified is remembered by its SHA-256 for some minutes, so that the
hash is computed once; the row is read each time, so that a revoked key counts no more at the next request.
"""

import hashlib
import hmac
import os
import re
import secrets
import sqlite3
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from realm_jax.errors import AuthenticationError, KeyFileError, RequestError
from realm_jax.serving.tenants import check_name

MAX_KEYS = 100_000
MAX_LABEL = 64
MAX_DAYS = 3650
REMEMBERED = 4096
REMEMBERED_S = 300.0

_FORM = re.compile(r"realm-([0-9a-f]{12})-([0-9a-f]{64})")
_ID = re.compile(r"[0-9a-f]{12}")
_APPLICATION = 0x5245414C  # "REAL": what SQLite writes into the file's head
_VERSION = 1
_NO_KEY = (b"\0" * 16, b"\0" * 32)  # a salt, and what no secret gives
_COLUMNS = "id, tenant, label, created, expires, revoked"
_SCHEMA = """
CREATE TABLE keys (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, label TEXT NOT NULL, salt BLOB NOT NULL, hash BLOB NOT NULL,
    created INTEGER NOT NULL, expires INTEGER, revoked INTEGER
)
"""


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key; times are seconds since 1970."""

    id: str
    tenant: str
    label: str
    created: int
    expires: int | None
    revoked: int | None

    def counts(self, now: float) -> bool:
        """Whether it was neither revoked nor has expired."""
        return self.revoked is None and (self.expires is None or now < self.expires)


@dataclass(frozen=True)
class NewKey:
    """A key that was just made, and the only place that has its text."""

    key: ApiKey
    text: str = field(repr=False)


class KeyStore:
    """The keys of a file, which is made if it is missing. May be called from any thread.

    Raises KeyFileError for a file that others may read or write, or that is no file of keys.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = Path(path)
        self._wall, self._clock = wall, clock
        self._lock = threading.Lock()
        self._verified: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()  # digest -> hash, until when
        _make_private(self.path)
        with self._naming_the_file():
            self._file = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._file.close()
                raise

    def close(self) -> None:
        """The file is closed."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> "KeyStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def create(self, tenant: str, label: str = "", expires_s: int | None = None) -> NewKey:
        """A new key of the tenant stands in the file; its text is nowhere but in what this returns.

        expires_s: seconds from now. Raises RequestError for a bad name, label or time.
        """
        check_name(tenant)
        if len(label) > MAX_LABEL or not all(c.isprintable() for c in label):
            raise RequestError(
                f"label is {label[:MAX_LABEL]!r}; give at most {MAX_LABEL} printable characters"
            )
        if expires_s is not None and not 1 <= expires_s <= MAX_DAYS * 86400:
            raise RequestError(f"expires is {expires_s} s; give from 1 second to {MAX_DAYS:,} days")
        now = int(self._wall())
        expires = None if expires_s is None else now + expires_s
        secret, salt = secrets.token_hex(32), secrets.token_bytes(16)
        hashed = _hash(secret, salt)
        with self._writing():
            (count,) = self._file.execute("SELECT count(*) FROM keys").fetchone()
            if count >= MAX_KEYS:
                raise RequestError(f"{self.path} has {count:,} keys, which is the most; use another file")
            key = ApiKey(secrets.token_hex(6), tenant, label, now, expires, None)
            values = (key.id, tenant, label, salt, hashed, now, expires)
            self._file.execute(
                "INSERT INTO keys (id, tenant, label, salt, hash, created, expires) VALUES (?,?,?,?,?,?,?)",
                values,
            )
        return NewKey(key, f"realm-{key.id}-{secret}")

    @property
    def is_empty(self) -> bool:
        """Whether no key was ever made; one that was revoked counts."""
        with self._lock, self._naming_the_file():
            return not self._file.execute("SELECT EXISTS(SELECT 1 FROM keys)").fetchone()[0]

    def all(self) -> list[ApiKey]:
        """All keys, the oldest first."""
        with self._lock, self._naming_the_file():
            rows = self._file.execute(f"SELECT {_COLUMNS} FROM keys ORDER BY created, id LIMIT {MAX_KEYS}")
            return [ApiKey(*row) for row in rows]

    def revoke(self, key_id: str) -> ApiKey:
        """The key counts no more, from the next request on; returns what it was before.

        Raises RequestError if there is no such key.
        """
        if not _ID.fullmatch(key_id):  # it may be a whole key, which is not repeated
            raise RequestError(
                "the id of a key has 12 digits or letters a to f; realm serve keys list has all"
            )
        with self._writing():
            row = self._file.execute(f"SELECT {_COLUMNS} FROM keys WHERE id = ?", (key_id,)).fetchone()
            if row is None:
                raise RequestError(f"{self.path} has no key {key_id}; realm serve keys list has all")
            now = int(self._wall())
            self._file.execute("UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (now, key_id))
        return ApiKey(*row)

    def verify(self, text: str) -> ApiKey:
        """The key that this is the text of, if it counts now.

        Raises AuthenticationError, after the same work whether the id or the secret is wrong. That work
        takes a processor tens of milliseconds and 16 MB: let few threads do it at once.
        """
        if not (form := _FORM.fullmatch(text)):
            raise AuthenticationError("the API key has not the form realm-ID-SECRET; send one that was given")
        with self._lock, self._naming_the_file():
            found = self._file.execute(
                f"SELECT {_COLUMNS}, salt, hash FROM keys WHERE id = ?", (form[1],)
            ).fetchone()
        salt, hashed = found[-2:] if found is not None else _NO_KEY
        is_right = self._is_right(text, form[2], salt, hashed)
        if found is None or not is_right or not (key := ApiKey(*found[:-2])).counts(self._wall()):
            raise AuthenticationError("the API key is unknown, revoked or expired; ask for a new one")
        return key

    def _is_right(self, text: str, secret: str, salt: bytes, hashed: bytes) -> bool:
        digest, now = hashlib.sha256(text.encode()).digest(), self._clock()
        with self._lock:
            known, until = self._verified.get(digest, (b"", now))
        if now < until and hmac.compare_digest(known, hashed):
            return True
        is_right = hmac.compare_digest(_hash(secret, salt), hashed)
        if is_right:
            with self._lock:
                self._verified[digest] = hashed, now + REMEMBERED_S
                self._verified.move_to_end(digest)
                while len(self._verified) > REMEMBERED:
                    self._verified.popitem(last=False)
        return is_right

    def _prepare(self) -> None:
        """The file is one of keys, a new one if it was empty."""
        execute = self._file.execute
        self._check_kind()  # before anything is written to another program's file
        if execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise KeyFileError(f"{self.path}: this file system has no shared memory; put it on a local disk")
        execute("BEGIN IMMEDIATE")
        try:
            if self._check_kind():
                execute(_SCHEMA)
                execute(f"PRAGMA application_id = {_APPLICATION}")
                execute(f"PRAGMA user_version = {_VERSION}")
            execute("COMMIT")
        except BaseException:
            execute("ROLLBACK")
            raise

    def _check_kind(self) -> bool:
        """Whether the file is new. Raises KeyFileError if it has something else than keys."""
        (application,), (version,), (tables,) = (
            self._file.execute(question).fetchone()
            for question in (
                "PRAGMA application_id",
                "PRAGMA user_version",
                "SELECT count(*) FROM sqlite_master",
            )
        )
        if (application, version, tables) == (0, 0, 0):
            return True
        if (application, version) != (_APPLICATION, _VERSION):
            raise KeyFileError(f"{self.path} is not a file of API keys of this version; name another one")
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """All that is done within is in the file, or nothing of it."""
        with self._lock, self._naming_the_file():
            self._file.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._file.execute("ROLLBACK")
                raise
            self._file.execute("COMMIT")

    @contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise KeyFileError(f"{self.path}: {error}; if it is damaged, name another file") from error


def _hash(secret: str, salt: bytes) -> bytes:
    return hashlib.scrypt(secret.encode(), salt=salt, n=2**14, r=8, p=1, dklen=32)


def _make_private(path: Path) -> None:
    """The file is there and the user's own, and nobody else may read or write it."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):  # a new one is the user's alone from its first moment
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        folder = path.resolve().parent.stat()
        if folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not folder.st_mode & stat.S_ISVTX:
            raise KeyFileError(f"{path}: others may write into its folder; chmod go-w {path.parent}")
        for each in (path, *(path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))):
            if each is not path and not each.exists():
                continue
            found = each.stat()
            if not stat.S_ISREG(found.st_mode):
                raise KeyFileError(f"{each} is not a file; name another one")
            if found.st_uid != os.geteuid():
                raise KeyFileError(f"{each} belongs to another user; name a file of your own")
            if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                mode = stat.S_IMODE(found.st_mode)
                raise KeyFileError(f"{each} is open to others (mode {mode:03o}); chmod 600 {each}")
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}; name a file that can be written") from error
