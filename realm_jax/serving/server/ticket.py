"""Between the engine's thread and one reader: what was said and not taken yet."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

from realm_jax.serving.request import GenerationOutput, Request, TextDelta, TokenLogprob


class Ticket:
    """Requests of one client in the engine. The engine's thread puts, the event loop takes.

    Deltas that a slow reader has not taken are kept, and merged when it does: there are no more of them than
    the requests may have tokens.
    """

    def __init__(self, model: str, requests: Sequence[Request], abort: "Callable[[Ticket], None]") -> None:
        self.model = model  # which of the server's has them
        self.loop = asyncio.get_running_loop()
        self.request_ids = tuple(request.id for request in requests)
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self._abort = abort
        self._lock = threading.Lock()
        self._pending: dict[tuple[str, int], list[TextDelta]] = {}
        self._left = {request.id: request.params.n for request in requests}
        self._failure: Exception | None = None
        self._news = asyncio.Event()
        self._is_closed = False
        self.tenant, self.adapter = requests[0].tenant, "+".join(requests[0].adapter_names)
        self.generated = 0  # tokens, so far
        self.on_close: Callable[[], None] = lambda: None

    @property
    def is_done(self) -> bool:
        """Whether all has been said and taken."""
        return not self._left and not self._pending and self._failure is None

    async def take(self, seconds: float | None = None) -> list[TextDelta]:
        """What came since, one delta a sample; nothing if nothing came in so many seconds.

        Raises what the engine failed with.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._something()
        with self._lock:
            pending, self._pending = self._pending, {}
            failure = self._failure
        if not pending and failure is not None:
            raise failure
        return [merged(deltas) for deltas in pending.values()]

    async def _something(self) -> None:
        """There is something to take, or nothing will come."""
        while True:
            self._news.clear()  # first: what comes after the look wakes the wait
            if self._pending or self._failure is not None or not self._left:
                return
            await self._news.wait()

    async def outputs(self) -> list[GenerationOutput]:
        """All samples, finished, request by request."""
        found: dict[tuple[str, int], GenerationOutput] = {}
        while not self.is_done:
            for delta in await self.take():
                if delta.output is not None:
                    found[delta.request_id, delta.sample_index] = delta.output
        order = {request_id: i for i, request_id in enumerate(self.request_ids)}
        return [found[key] for key in sorted(found, key=lambda key: (order[key[0]], key[1]))]

    def close(self) -> None:
        """What has not ended is aborted."""
        if not self._is_closed:
            self._is_closed = True
            if self._left:
                self._abort(self)
            self.on_close()

    def put(self, delta: TextDelta) -> bool:
        """The delta waits to be taken; whether its request has ended with it. The caller wakes the reader."""
        with self._lock:
            self.generated += len(delta.token_ids)
            if not self._is_closed:
                self._pending.setdefault((delta.request_id, delta.sample_index), []).append(delta)
            if delta.output is not None:
                self._left[delta.request_id] -= 1
                if not self._left[delta.request_id]:
                    del self._left[delta.request_id]
                    return True
        return False

    def wake(self) -> None:
        """The reader looks again. On the event loop."""
        self._news.set()

    def accept(self) -> None:
        """The requests run."""
        self._soon(self._settle, None)

    def refuse(self, error: Exception) -> None:
        """None of the requests runs, and this is why."""
        self._left.clear()
        self._soon(self._settle, error)

    def fail(self, error: Exception) -> None:
        """The engine has lost the requests."""
        with self._lock:
            self._left.clear()
            self._failure = error
        self._soon(self.wake)

    def _settle(self, error: Exception | None) -> None:
        if self.accepted.done():  # cancelled: its client has left
            return
        if error is None:
            self.accepted.set_result(None)
        else:
            self.accepted.set_exception(error)

    def _soon(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads
            self.loop.call_soon_threadsafe(function, *arguments)


def merged(deltas: Sequence[TextDelta]) -> TextDelta:
    """Deltas of one sample that follow one another, as one."""
    if len(deltas) == 1:
        return deltas[0]
    last = deltas[-1]
    logprobs: list[TokenLogprob] | None = None
    if last.logprobs is not None:
        logprobs = [each for delta in deltas for each in delta.logprobs or ()]
    return TextDelta(
        last.request_id,
        last.sample_index,
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.token_ids],
        last.output,
        logprobs,
    )
