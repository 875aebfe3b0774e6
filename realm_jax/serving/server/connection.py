"""Work for a client that may leave, and streams of events to one."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from realm_jax.serving.server.limits import Limits

T = TypeVar("T")
LEFT = 499  # what nginx logs: the client closed the connection before the answer


class ClientLeft(Exception):
    """Nobody is there to be answered."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What the work returns. Raises ClientLeft as soon as the client leaves; the work is cancelled then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events, each sent as soon as it is there; None sends a comment that keeps the way open.

    events: texts of one line. close: called with "done", "left" or "stalled": all were sent, the client has
    gone, or it takes nothing any more.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str | None],
        limits: Limits,
        close: Callable[[str], None],
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._limits, self._close = events, limits, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        how = "left"
        try:
            await while_connected(receive, self._send_all(send))
            how = "done"
        except ClientLeft:
            pass
        except TimeoutError:
            how = "stalled"
        finally:
            self._close(how)

    async def _send_all(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        await self._within(send(start))
        async for event in self._events:
            text = ": ping\n\n" if event is None else f"data: {event}\n\n"
            await self._within(send(_body(text, more=True)))
        await self._within(send(_body("data: [DONE]\n\n", more=False)))

    async def _within(self, sending: Awaitable[None]) -> None:
        """The bytes are on their way: the client's buffers have room. Raises TimeoutError if it has none."""
        async with asyncio.timeout(self._limits.write_seconds):
            await sending


def _body(text: str, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode("ascii"), "more_body": more}
