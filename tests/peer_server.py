"""`llama_cpp.server`, of another Python's packages, as a process: it answers one request at a time."""

import os
import socket
import subprocess
import time
from pathlib import Path

import httpx

START_S = 300.0


class PeerServer:
    """A running server of a GGUF file; no request interrupts another."""

    def __init__(self, python: str, model: Path, context: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        threads = str(os.cpu_count())
        flags = {"model": str(model), "n_ctx": str(context), "port": str(port), "n_threads": threads}
        flags |= {"n_threads_batch": threads, "interrupt_requests": "False", "verbose": "False"}
        command = [python, "-m", "llama_cpp.server"]
        for name, value in flags.items():
            command += [f"--{name}", value]
        mine = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(
            command, env=mine, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._wait()

    def _wait(self) -> None:
        """It answers. Raises SystemExit with its last line where it does not start."""
        end = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < end:
            try:
                if httpx.get(f"{self.address}/v1/models").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        self._process.kill()
        _, errors = self._process.communicate()
        said = (errors or "").strip().splitlines()
        raise SystemExit(
            f"error: llama_cpp.server does not start: {said[-1] if said else 'it said nothing'} "
            "(pip install 'llama-cpp-python[server]')"
        )

    def close(self) -> None:
        """Nothing of the process is left."""
        self._process.kill()
        self._process.communicate()
