"""`realm serve` as a process."""

import json
import subprocess
import sys
import threading
import time

from command_line import ROOT, environment
from running_server import PATIENCE, wait_for


class Served:
    """A running `realm serve`."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "realm_jax", "serve", "--port", "0", *map(str, arguments)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.events: list[dict[str, object]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            is_ours = line.startswith("{")  # XLA's C++ writes there as well
            self.events.append(json.loads(line) if is_ours else {"event": "other", "text": line})

    def event(self, name: str) -> dict[str, object]:
        """The first event of this name, once it is there."""
        wait_for(lambda: self.process.poll() is not None or any(e["event"] == name for e in self.events))
        return next(e for e in self.events if e["event"] == name)

    def end(self) -> int:
        """The exit code; all of the log has been read."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code

    def close(self) -> None:
        """Nothing of the process is left."""
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def address(self) -> str:
        """Where it serves, once it does: it may have to compile everything first."""
        deadline = time.monotonic() + 4 * PATIENCE
        while not any(e["event"] == "ready" for e in self.events):
            assert self.process.poll() is None and time.monotonic() < deadline, self.events
            time.sleep(0.1)
        return str(self.event("ready")["address"])
