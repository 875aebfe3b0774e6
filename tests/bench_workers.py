"""Processes that measure, each spoken to in lines of JSON. Needs the standard library alone.

A worker that nobody speaks to waits for its next line and runs nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAUSE = 0.05  # seconds; threads of whoever ran last spin a while before they sleep


class WorkerError(Exception):
    """A worker could not do what it was asked to; the message says why."""


class Worker:
    """A worker's process, started when first asked for something."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name, self.command = name, list(command)
        self._process: subprocess.Popen[str] | None = None

    def ask(self, task: str, **arguments: Any) -> Any:
        """What the worker's method of that name returns. Raises WorkerError."""
        if self._process is None:
            self._process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"task": task, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            answer = ""
        else:
            answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self.close()
            raise WorkerError(f"{self.name} died with exit code {code} in {task}")
        said = json.loads(answer)
        if "error" in said:
            raise WorkerError(f"{self.name}: {said['error']}")
        return said["result"]

    def close(self) -> None:
        """The process has ended and its memory is free."""
        if self._process is not None:
            self._process.communicate()  # it ends where its input does
            self._process = None


def serve(worker: object) -> None:
    """Answer on stdout what stdin asks, until it ends. Whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            time.sleep(PAUSE)
            said = {"result": getattr(worker, asked.pop("task"))(**asked)}
        except (Exception, SystemExit) as error:
            if type(error).__module__ == "builtins" and not isinstance(error, SystemExit | OSError):
                traceback.print_exc()
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), file=answers, flush=True)


def run_process(command: Sequence[str]) -> dict[str, Any]:
    """Seconds that the command took from start to end, its peak of resident memory in bytes, and stdout.

    Raises WorkerError with the last line of its stderr if it failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            out = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().splitlines() or [""])[-1]
            raise WorkerError(f"{Path(command[0]).name} ended with exit code {process.returncode}: {last}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * unit, "out": out}
