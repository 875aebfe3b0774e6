"""What a person sees on stderr while a file arrives."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

SECONDS_BETWEEN_LINES = 5.0


def megabytes(count: int) -> str:
    """The count of bytes as people write it, with one decimal: ``92.9 MB``."""
    return f"{count / 1e6:,.1f} MB"


class Arrival:
    """The arrival of one file: a bar on a terminal, else a line every few seconds.

    ``show``: True = bar, False = silence but for notes, None = a bar only where stderr is a terminal.
    """

    def __init__(self, label: str, show: bool | None = None) -> None:
        self._label = label
        self._quiet = show is False
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if show or (show is None and sys.stderr.isatty()):
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=None)

    def __enter__(self) -> "Arrival":
        if self._bar:
            self._bar.start()
        elif not self._quiet:
            self.note(f"downloading {self._label}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def at(self, done: int, total: int | None) -> None:
        """The person can see that ``done`` of ``total`` bytes are here (None: the server did not say)."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total)
        elif not self._quiet and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self.note(f"{self._label}: {megabytes(done)}" + (f" of {megabytes(total)}" if total else ""))

    def note(self, line: str) -> None:
        """The line stands on stderr, above the bar if there is one."""
        self._last_line = time.monotonic()
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)
