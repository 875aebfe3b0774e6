"""HTTP whose requests must come in time: uvicorn alone waits for a first request, or half of one, forever."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class PunctualHTTP(H11Protocol):
    """A connection that is closed if no whole head of a request comes within some seconds."""

    def __init__(self, *arguments: Any, seconds: float, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._seconds = seconds
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The first request is awaited."""
        super().connection_made(transport)
        self._await_head()

    def on_response_complete(self) -> None:
        """The next request is awaited."""
        super().on_response_complete()
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is awaited."""
        self._forget()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._forget()
        self._late = self.loop.call_later(self._seconds, self._close_if_late)

    def _close_if_late(self) -> None:
        is_served = self.cycle is not None and not self.cycle.response_complete
        if not is_served and not self.transport.is_closing():
            self.transport.close()

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
