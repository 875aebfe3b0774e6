"""Ctrl-C: it is never lost, and the process ends at once."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

INTERRUPTED = 130  # 128 + SIGINT, as shells count
SOON = 0.05
"""Seconds: within the hook itself it would be lost again."""


@contextmanager
def repeated_where_lost() -> Iterator[None]:
    """A Ctrl-C that arrives in a callback of the garbage collector, such as JAX's, comes once more.

    Python reports what such callbacks raise, and goes on.
    """
    usual = sys.unraisablehook

    def hook(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            main = threading.main_thread().ident
            threading.Timer(SOON, signal.pthread_kill, (main, signal.SIGINT)).start()
        else:
            usual(lost)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = usual


def leave() -> NoReturn:
    """The process has ended; a thread that still compiles would crash in what a usual exit takes down."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(INTERRUPTED)
