"""The process that renders templates nobody has read."""

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

START_SECONDS = 30.0
SECONDS = 2.0
ANSWER_BYTES = 16 << 20  # the text's limit, in JSON's longest spelling, and room to spare


class Sandbox:
    """One process, started when needed and replaced when a template breaks it or its bounds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def outcome(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """What `template_worker.outcome` says, within its bounds; overrunning them is an error too."""
        request = json.dumps({"template": template, "variables": variables}).encode() + b"\n"
        with self._lock:
            try:
                answer = self._ask(request)
            except BaseException:
                self.close()  # or the next request would get this one's answer
                raise
            result = _result(answer)
            if "error" in result:
                self.close()  # what a bad template leaves in memory would burden the next
            return result

    def _ask(self, request: bytes) -> bytes | None:
        process = self._started()
        if process is None:
            return b""
        assert process.stdin is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        return _answer(process, SECONDS)

    def _started(self) -> subprocess.Popen[bytes] | None:
        """A process that waits for a request; None if none can be had."""
        if self._process is not None and self._process.poll() is not None:
            self.close()
        if self._process is None:
            # Of this process's environment, only where modules lie: secrets are no business of a template.
            path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "realm_jax.chat.template_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={"PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for the conversation, not for the worker
            )
            if _answer(self._process, START_SECONDS) != b"{}\n":
                self.close()
        return self._process

    def close(self) -> None:
        """No process, and no pipe to one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):  # what was not sent needs no sending
                    pipe.close()


def _answer(process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """One line of the process; without its end if the process ended or wrote too much; None if late."""
    assert process.stdout is not None
    deadline, line = time.monotonic() + seconds, bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n") and len(line) <= ANSWER_BYTES:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(process.stdout.fileno(), 1 << 16)
            if not chunk:
                break
            line += chunk
    return bytes(line)


def _result(answer: bytes | None) -> dict[str, Any]:
    if answer is None:
        return {"error": f"took longer than {SECONDS:g} s"}
    if not answer.endswith(b"\n"):
        return {"error": "broke the process that renders it"}
    return json.loads(answer)


_sandbox = Sandbox()
atexit.register(_sandbox.close)
outcome = _sandbox.outcome
