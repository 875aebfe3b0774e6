"""The engine on a thread of its own: it alone loads the model and steps it; the event loop never waits.

Commands go to the thread through a queue and are read between steps. What a step makes goes into the tickets
of its requests: the engine waits for no reader, and what nobody has taken yet is bounded by what its request
may generate.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from realm_jax.errors import RealmError
from realm_jax.llm import LLM
from realm_jax.serving.request import Request, TextDelta
from realm_jax.serving.server.errors import Unavailable
from realm_jax.serving.server.ticket import Ticket

log = logging.getLogger("realm.engine")
T = TypeVar("T")


class Observer(Protocol):
    """Who hears what the engine does, on the engine's thread."""

    def on_delta(self, delta: TextDelta, tenant: str, adapter: str) -> None: ...
    def on_load(self, running: int, waiting: int) -> None: ...


@dataclass(frozen=True)
class _Add:
    requests: Sequence[Request]
    ticket: Ticket


@dataclass(frozen=True)
class _Abort:
    ticket: Ticket


@dataclass(frozen=True)
class _Call:
    function: Callable[[LLM], Any]
    result: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class _AbortAll:
    pass


class _Stop:
    pass


_Command = _Add | _Abort | _Call | _AbortAll | _Stop


class EngineThread:
    """Owns the engine's loop. All methods may be called from any thread; `submit` and `call` from a loop.

    failure: why the model could not be loaded.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        observer: Observer,
        *,
        on_ready: Callable[[], None] = lambda: None,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self._load, self._observer = load, observer
        self._on_ready, self._on_failure = on_ready, on_failure
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._tickets: dict[str, Ticket] = {}  # by request; the thread's own
        self._llm: LLM | None = None
        self._is_stopping = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def is_ready(self) -> bool:
        return self._llm is not None and not self._is_stopping

    @property
    def llm(self) -> LLM:
        """The model, for what only reads it. Raises Unavailable while it loads, and when the server ends."""
        if self._llm is None:
            raise Unavailable("the model is still being loaded; try again later")
        if self._is_stopping:
            raise Unavailable("the server is shutting down; try another one")
        return self._llm

    def start(self) -> None:
        """The model loads."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> bool:
        """All requests have ended; whether the thread has, too, in so many seconds."""
        self._is_stopping = True
        if self._thread.ident is None:  # it never began
            return True
        self._inbox.put(_Stop())
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def submit(self, requests: Sequence[Request]) -> Ticket:
        """All of these run, or none does; their deltas come from the ticket, which must be closed.

        Raises RequestError for one that cannot be served, CapacityError if too many wait.
        """
        _ = self.llm
        ticket = Ticket(requests, self._abort)
        self._inbox.put(_Add(requests, ticket))
        try:
            await ticket.accepted
        except BaseException:
            ticket.close()
            raise
        return ticket

    async def stream(self, request: Request) -> AsyncIterator[TextDelta]:
        """What a request says, as it comes; leaving early aborts it."""
        ticket = await self.submit([request])
        try:
            while not ticket.is_done:
                for delta in await ticket.take():
                    yield delta
        finally:
            ticket.close()

    async def call(self, function: Callable[[LLM], T]) -> T:
        """What the function returns, called on the engine's thread between steps."""
        _ = self.llm
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        self._inbox.put(_Call(function, result, loop))
        return await result

    def abort_all(self) -> None:
        """Every request ends with what it has said."""
        self._inbox.put(_AbortAll())

    def _abort(self, ticket: Ticket) -> None:
        self._inbox.put(_Abort(ticket))

    def _run(self) -> None:
        try:
            llm = self._load()
        except Exception as error:  # raised again by who started the thread
            self.failure = error
            self._on_failure()
            return
        self._llm = llm
        if not self._is_stopping:
            self._on_ready()
        while self._obey(llm):
            if llm.engine.has_work:
                self._step(llm)
            scheduler = llm.engine.scheduler
            self._observer.on_load(sum(1 for _ in scheduler.slots.taken()), scheduler.num_waiting)
        self._end_all()

    def _obey(self, llm: LLM) -> bool:
        """All commands that came are carried out, and at least one if there is no work; False to stop."""
        must_wait = not llm.engine.has_work
        while True:
            try:
                command = self._inbox.get(block=must_wait)
            except queue.Empty:
                return True
            must_wait = False
            match command:
                case _Add(requests, ticket):
                    self._add(llm, requests, ticket)
                case _Abort(ticket):
                    self._end(llm, ticket)
                case _AbortAll():
                    for ticket in {id(t): t for t in self._tickets.values()}.values():
                        self._end(llm, ticket)
                case _Call():
                    self._answer(llm, command)
                case _Stop():
                    return False

    def _add(self, llm: LLM, requests: Sequence[Request], ticket: Ticket) -> None:
        added: list[Request] = []
        try:
            for request in requests:
                llm.engine.add_request(request)
                added.append(request)
        except Exception as error:  # theirs alone: the engine goes on
            for request in added:
                llm.engine.abort(request.id)
            if not isinstance(error, RealmError):
                log.exception("adding a request failed")
            ticket.refuse(error)
            return
        self._tickets |= {request.id: ticket for request in requests}
        ticket.accept()

    def _end(self, llm: LLM, ticket: Ticket) -> None:
        """The ticket's requests have ended, and it has their ends."""
        deltas = [delta for id in ticket.request_ids for delta in llm.engine.abort(id)]
        self._deliver(deltas)
        for request_id in ticket.request_ids:
            self._tickets.pop(request_id, None)

    def _step(self, llm: LLM) -> None:
        try:
            deltas = llm.engine.step()
        except Exception as error:  # the engine has ended all sequences, and goes on with later ones
            log.exception("a step failed; its requests are lost")
            self._fail_all(error)
            return
        self._deliver(deltas)

    def _deliver(self, deltas: Sequence[TextDelta]) -> None:
        """Every ticket has its deltas, and their readers are awake: one call a step for each event loop."""
        touched: dict[int, Ticket] = {}
        for delta in deltas:
            ticket = self._tickets.get(delta.request_id)
            if ticket is not None:
                self._observer.on_delta(delta, ticket.tenant, ticket.adapter)
                touched[id(ticket)] = ticket
                if ticket.put(delta):
                    del self._tickets[delta.request_id]
        by_loop: dict[asyncio.AbstractEventLoop, list[Ticket]] = {}
        for ticket in touched.values():
            by_loop.setdefault(ticket.loop, []).append(ticket)
        for loop, tickets in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: nobody reads
                loop.call_soon_threadsafe(_wake, tickets)

    def _end_all(self) -> None:
        """Nobody waits for this thread any more."""
        error = Unavailable("the server is shutting down; try another one")
        self._fail_all(error)
        while not self._inbox.empty():
            match self._inbox.get():
                case _Add(_, ticket):
                    ticket.refuse(error)
                case _Call(_, result, loop):
                    with suppress(RuntimeError):
                        loop.call_soon_threadsafe(_resolve, result, None, error)

    def _fail_all(self, error: Exception) -> None:
        tickets, self._tickets = self._tickets, {}
        for ticket in {id(t): t for t in tickets.values()}.values():
            ticket.fail(error)

    def _answer(self, llm: LLM, call: _Call) -> None:
        try:
            value, error = call.function(llm), None
        except Exception as raised:  # the caller's, who has it from the future
            value, error = None, raised
        with suppress(RuntimeError):
            call.loop.call_soon_threadsafe(_resolve, call.result, value, error)


def _wake(tickets: Sequence[Ticket]) -> None:
    for ticket in tickets:
        ticket.wake()


def _resolve(result: "asyncio.Future[Any]", value: object, error: Exception | None) -> None:
    if result.done():
        return
    if error is None:
        result.set_result(value)
    else:
        result.set_exception(error)
