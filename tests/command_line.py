"""The command `realm` as tests run it: inside this process, or as a process of its own."""

import atexit
import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from realm_jax import cli, hub

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """How a command ended and what it printed."""

    code: int | str | None
    out: str
    err: str
    seconds: float

    @property
    def error(self) -> str:
        """The user's error; fails unless it is one line at the end, without results or traceback."""
        lines = self.err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert self.code in (1, 2), self
        assert len(errors) == 1 and lines[-1] == errors[0], self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        return errors[0].removeprefix("error: ")


@functools.cache
def cache() -> Path:
    """A REALM_CACHE for all command lines of this run of the tests, with the programs of all tests."""
    folder = Path(tempfile.mkdtemp(prefix="realm-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    programs = hub.cache_dir() / "xla"
    programs.mkdir(parents=True, exist_ok=True)
    (folder / "xla").symlink_to(programs.absolute(), target_is_directory=True)
    return folder


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's variables without the user's settings of realm, with the changes."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("REALM_")}
    return kept | {"REALM_CACHE": str(cache())} | dict(changes or {})


def realm(*arguments: object, stdin: str | bytes = "", env: Mapping[str, str] | None = None) -> Done:
    """The command run in this process."""
    given = stdin.encode() if isinstance(stdin, str) else stdin
    streams = [io.TextIOWrapper(io.BytesIO(b), "utf-8", write_through=True) for b in (given, b"", b"")]
    start = time.perf_counter()
    with (
        mock.patch.object(sys, "argv", ["realm", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", streams[0]),
        mock.patch.dict(os.environ, environment(env), clear=True),
        contextlib.redirect_stdout(streams[1]),
        contextlib.redirect_stderr(streams[2]),
    ):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    out, err = (stream.buffer.getvalue().decode() for stream in streams[1:])  # pyright: ignore[reportAttributeAccessIssue]: BytesIO
    return Done(code, out, err, time.perf_counter() - start)


def start(*arguments: object, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen:
    """The command as a process, its three streams as pipes unless options say else."""
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "realm_jax",
            *(os.fsdecode(a) if isinstance(a, bytes) else str(a) for a in arguments),
        ],
        cwd=ROOT,
        env=environment(env),
        **(streams | options),  # pyright: ignore[reportArgumentType, reportCallIssue]
    )


def spawn(*arguments: object, stdin: str | bytes = "", env: Mapping[str, str] | None = None) -> Done:
    """The command run to its end as a process of its own."""
    begun = time.perf_counter()
    given = stdin.encode() if isinstance(stdin, str) else stdin
    with start(*arguments, env=env) as process:
        out, err = process.communicate(given, timeout=120)
    return Done(process.returncode, out.decode(), err.decode(), time.perf_counter() - begun)
