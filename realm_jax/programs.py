"""Compiled programs, kept on disk: a program that ran before on this machine is neither traced nor compiled.

An entry is JAX's serialized executable with the structure of what it takes and gives. Its name is a hash of
all that decides what would be compiled: this package's files, the versions, the device, JAX's settings, the
function, its static arguments, and the structure, shapes and types of the others.
JAX's own compilation cache is not needed, and is off where JAX_COMPILATION_CACHE_DIR names no folder; where
it does, it spares a compilation whose program is the same and only the hash is new.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import logging
import os
import pickle
import re
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jaxlib.version

import realm_jax
from realm_jax.kernels.pallas import tuning

BUILDS = 4
"""So many folders are kept, the ones used last: each version of this package and of JAX fills its own."""

AHEAD = 3
"""So many programs of a run are expected by the next one like it: the empty state, a prefill and a step."""

COMPILED, CACHE_HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
"""A program is written only by the process that compiled it: one that came from JAX's own cache cannot be
serialized again. What XLA's CPU backend then writes lacks functions, and fails when it runs."""

_log = logging.getLogger(__name__)
_loaded: "weakref.WeakValueDictionary[str, Program]" = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled program: engines of the same shapes share it, and it goes with the last of them."""

    run: jax.stages.Compiled  # takes the arguments that are not static


class Programs:
    """Where programs come from: this process, the folder, or the compiler.

    folder: None = nothing is kept on disk.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = None if folder is None else _private(folder / _build())
        self._expected: dict[str, Future[Program | None]] = {}
        self._hint: Path | None = None
        self._hinted: list[str] = []
        self._used: list[str] = []

    def expect(self, run: object) -> None:
        """The programs that such a run needed first are being loaded, by other threads.

        run: what makes runs alike; its repr counts. A wrong expectation costs time and nothing else.
        """
        if self._folder is None:
            return
        self._hint = self._folder / f"{_hash(repr(run))}.json"
        with contextlib.suppress(OSError, ValueError):
            self._hinted = [str(key) for key in json.loads(self._hint.read_text())][:AHEAD]
        pool = ThreadPoolExecutor(AHEAD)
        missing = [key for key in self._hinted if key not in _loaded]
        self._expected = {key: pool.submit(_read, self._folder / key, key) for key in missing}
        pool.shutdown(wait=False)  # takes no more; what was submitted goes on

    def get(self, function: Any, *arguments: Any, on_compile: Callable[[], None]) -> Program:
        """The program of a jitted function for arguments like these.

        function: jitted, or a method or `functools.partial` of one, whose object or values are static.
        on_compile: called before a program is compiled; one that is found is not announced.
        """
        jitted, static = _parts(function)
        key = _key(jitted, static, arguments)
        self._note(key)
        program = _loaded.get(key) or self._find(key)
        if program is None:
            on_compile()
            lowered = jitted.lower(*static, *arguments)
            with _events() as events:
                program = Program(lowered.compile())
            if COMPILED in events and CACHE_HIT not in events:
                self._write(key, program)
        _loaded[key] = program
        return program

    def _find(self, key: str) -> Program | None:
        if self._folder is None:
            return None
        expected = self._expected.pop(key, None)
        return _read(self._folder / key, key) if expected is None else expected.result()

    def _note(self, key: str) -> None:
        """The next run like this one expects the program, if it is among the first."""
        if self._hint is None:
            return
        if len(self._used) == AHEAD:
            self._expected.clear()  # what was expected in vain is dropped
            return
        self._used.append(key)
        if self._used != self._hinted[: len(self._used)]:
            self._hinted = list(self._used)
            _replace(self._hint, json.dumps(self._used).encode())

    def _write(self, key: str, program: Program) -> None:
        """The program stands in the folder, if it can be serialized and runs on one device."""
        from jax.experimental import serialize_executable

        executable: Any = program.run.runtime_executable()
        device, *others = executable.local_devices()
        is_shared = bool(others) or jax.process_count() > 1
        if self._folder is None or is_shared or not _is_as_imported():
            return
        try:
            data = pickle.dumps((device.id, *serialize_executable.serialize(program.run)))
        except Exception as error:  # of XLA, of pickle: whatever a backend cannot do
            _log.info("a program is not kept: %s", error)
            return
        _replace(self._folder / key, _checksum(key, data) + data)


def _read(file: Path, key: str) -> Program | None:
    """The entry's program; None where there is none or it is damaged, foreign or of another XLA.

    Unpickling runs what the file says: the folder is this user's alone, and the checksum finds accidents.
    """
    from jax.experimental import serialize_executable

    try:
        content = file.read_bytes()
        checksum, data = content[:32], memoryview(content)[32:]
        if checksum != _checksum(key, data):
            raise ValueError("its checksum is wrong")
        device, *executable = pickle.loads(data)
        devices = [d for d in jax.devices() if d.id == device]
        return Program(serialize_executable.deserialize_and_load(*executable, execution_devices=devices))
    except FileNotFoundError:
        return None
    except Exception as error:  # of pickle, of XLA: no entry is worth more than compiling anew
        _log.info("the stored program %s is replaced: %s", file, error)
        return None


@contextlib.contextmanager
def _events() -> Iterator[set[str]]:
    """The set grows by what JAX says of its compilations in this thread."""
    events: set[str] = set()
    thread = threading.get_ident()

    def listen(event: str, *_: object, **__: object) -> None:
        if threading.get_ident() == thread:
            events.add(event)

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.monitoring.unregister_event_duration_listener(listen)


def _parts(function: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jitted function and its leading static arguments."""
    if isinstance(function, functools.partial):
        jitted, static = function.func, function.args
    elif inspect.ismethod(function):
        jitted, static = function.__func__, (function.__self__,)
    else:
        jitted, static = function, ()
    plain: Any = inspect.unwrap(jitted)
    if inspect.ismethod(plain) or plain.__closure__:
        raise AssertionError(
            f"{plain.__qualname__} holds values that its name does not say; make them static"
        )
    return jitted, static


def _key(jitted: Any, static: tuple[Any, ...], arguments: tuple[Any, ...]) -> str:
    """The name of the program: equal for two programs only if the same would be compiled."""
    leaves, structure = jax.tree.flatten(arguments)
    types = [(x.shape, str(x.dtype), getattr(x, "weak_type", False), _place(x)) for x in leaves]
    text = repr((_surroundings(), jitted.__module__, jitted.__qualname__, static, str(structure), types))
    if re.search(r" at 0x[0-9a-f]+", text):
        raise AssertionError(f"{jitted.__qualname__}: the repr of what is static must say its value: {text}")
    return _hash(text)


def _place(x: Any) -> str:
    """Where an array stands: how it is divided, and over which devices, in their order."""
    if not isinstance(x, jax.Array):
        return ""
    return f"{x.sharding!r} {[device.id for device in x.sharding._internal_device_list]}"


def _surroundings() -> list[Any]:
    """What decides how functions are compiled, apart from themselves."""
    device = jax.devices()[0]
    variables = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC")
    return [
        *(os.environ.get(name) for name in variables),
        (device.platform, device.device_kind, device.client.platform_version, jax.device_count()),
        os.cpu_count(),
        tuning.override(),
        sorted((name, repr(value)) for name, value in jax.config.values.items()),
    ]


@functools.cache
def _build() -> str:
    """A name for this package's files and the versions below it."""
    digest = hashlib.sha256(f"{jax.__version__} {jaxlib.version.__version__}".encode())
    for file in _sources():
        digest.update(f"\0{file.name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _is_as_imported() -> bool:
    """No file of the package has changed since this process imported it: its name says what it runs."""
    return max(file.stat().st_mtime for file in _sources()) < realm_jax.IMPORTED


def _sources() -> list[Path]:
    files = Path(__file__).parent.rglob("*")
    return sorted(file for file in files if "__pycache__" not in file.parts and file.is_file())


def _private(folder: Path) -> Path | None:
    """The folder, made where it was missing; older ones beside it are gone. None where it cannot be trusted.

    It is this user's alone, because its entries are unpickled.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        is_new = not folder.exists()
        for each in (folder.parent, folder):
            each.mkdir(mode=0o700, exist_ok=True)
            facts = each.stat()
            if os.name == "posix" and (facts.st_uid != os.geteuid() or facts.st_mode & 0o022):
                raise PermissionError(f"{each} can be written by others")
        if is_new:
            _keep_recent(folder.parent)
        os.utime(folder)
    except OSError as error:
        _log.info("no programs are kept: %s", error)
        return None
    return folder


def _keep_recent(parent: Path) -> None:
    """Of the folders only the ones used last are left."""
    folders = sorted(parent.iterdir(), key=lambda each: each.stat().st_mtime, reverse=True)
    for old in folders[BUILDS:]:
        shutil.rmtree(old, ignore_errors=True)


def _replace(file: Path, content: bytes) -> None:
    """The file has this content, at once and whole, whoever else writes it; if not, the log says why."""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
        with os.fdopen(handle, "wb") as temporary:
            temporary.write(content)
        Path(name).replace(file)
    except OSError as error:
        _log.info("a program is not kept: %s", error)


def _checksum(key: str, data: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(key.encode())
    digest.update(data)
    return digest.digest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:40]
