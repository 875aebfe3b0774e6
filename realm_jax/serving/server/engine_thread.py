"""All engines on one thread of their own: it alone steps them; the event loop never waits.

Engines that have work take turns, one step each. Commands go to the thread through a queue and are read
between steps. What a step makes goes into the tickets of its requests: the engine waits for no reader, and
what nobody has taken yet is bounded by what its request may generate.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
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
    """Who hears what the engines do, on their thread. model: the name that is shown."""

    def on_delta(self, delta: TextDelta, model: str, tenant: str, adapter: str) -> None: ...
    def on_load(self, model: str, running: int, waiting: int) -> None: ...


@dataclass(frozen=True)
class _Add:
    requests: Sequence[Request]
    ticket: Ticket


@dataclass(frozen=True)
class _Abort:
    ticket: Ticket


@dataclass(frozen=True)
class _Call:
    function: Callable[[], Any]
    result: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class _AbortAll:
    pass


class _Stop:
    pass


_Command = _Add | _Abort | _Call | _AbortAll | _Stop


class EngineThread:
    """Owns the loop of all engines. All methods may be called from any thread, coroutines from a loop."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._llms: dict[str, LLM] = {}  # by the model's name, whose turn is next first; the thread's own
        self._tickets: dict[str, Ticket] = {}  # by request; the thread's own
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Commands are obeyed."""
        self._thread.start()

    def stop(self, seconds: float = 10.0) -> bool:
        """All requests have ended; whether the thread has, too, in so many seconds."""
        self._is_stopping = True
        if self._thread.ident is None:  # it never began
            return True
        self._inbox.put(_Stop())
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def attach(self, model: str, llm: LLM) -> None:
        """The model's requests are served."""
        await self._do(lambda: self._llms.update({model: llm}))

    async def detach(self, model: str) -> None:
        """The thread knows nothing of the model any more; what of its requests still ran has ended."""
        await self._do(lambda: self._detach(model))

    async def submit(self, model: str, requests: Sequence[Request]) -> Ticket:
        """All of these run, or none does; their deltas come from the ticket, which must be closed.

        Raises RequestError for one that cannot be served, CapacityError if too many wait.
        """
        self._check_running()
        ticket = Ticket(model, requests, self._abort)
        self._inbox.put(_Add(requests, ticket))
        try:
            await ticket.accepted
        except BaseException:
            ticket.close()
            raise
        return ticket

    async def call(self, model: str, function: Callable[[LLM], T]) -> T:
        """What the function returns, called on the engine's thread between steps."""
        return await self._do(lambda: function(self._llms[model]))

    async def _do(self, function: Callable[[], T]) -> T:
        self._check_running()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()
        self._inbox.put(_Call(function, result, loop))
        return await result

    def _check_running(self) -> None:
        if self._is_stopping:
            raise Unavailable("the server is shutting down; try another one")

    def abort_all(self) -> None:
        """Every request ends with what it has said."""
        self._inbox.put(_AbortAll())

    def _abort(self, ticket: Ticket) -> None:
        self._inbox.put(_Abort(ticket))

    def _run(self) -> None:
        while self._obey():
            self._take_turn()
        self._end_all()

    def _obey(self) -> bool:
        """All commands that came are carried out, and at least one if there is no work; False to stop."""
        must_wait = not any(llm.engine.has_work for llm in self._llms.values())
        while True:
            try:
                command = self._inbox.get(block=must_wait)
            except queue.Empty:
                return True
            must_wait = False
            match command:
                case _Add(requests, ticket):
                    self._add(requests, ticket)
                case _Abort(ticket):
                    self._end(ticket)
                case _AbortAll():
                    for ticket in {id(t): t for t in self._tickets.values()}.values():
                        self._end(ticket)
                case _Call():
                    self._answer(command)
                case _Stop():
                    return False

    def _take_turn(self) -> None:
        """The engine whose turn it is, of those that have work, is one step further; the next is next."""
        busy = (model for model, llm in self._llms.items() if llm.engine.has_work)
        if (model := next(busy, None)) is not None:
            self._step(model)
            self._llms[model] = self._llms.pop(model)
        for name, llm in self._llms.items():
            scheduler = llm.engine.scheduler
            self._observer.on_load(name, sum(1 for _ in scheduler.slots.taken()), scheduler.num_waiting)

    def _detach(self, model: str) -> None:
        for ticket in {id(t): t for t in self._tickets.values() if t.model == model}.values():
            self._end(ticket)
        if self._llms.pop(model, None) is not None:
            self._observer.on_load(model, 0, 0)

    def _add(self, requests: Sequence[Request], ticket: Ticket) -> None:
        added: list[Request] = []
        llm = self._llms[ticket.model]  # it has users, and so is not unloaded
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

    def _end(self, ticket: Ticket) -> None:
        """The ticket's requests have ended, and it has their ends."""
        if (llm := self._llms.get(ticket.model)) is not None:
            self._deliver([delta for id in ticket.request_ids for delta in llm.engine.abort(id)])
        for request_id in ticket.request_ids:
            self._tickets.pop(request_id, None)

    def _step(self, model: str) -> None:
        try:
            deltas = self._llms[model].engine.step()
        except Exception as error:  # the engine has ended all sequences, and goes on with later ones
            log.exception("a step failed; its requests are lost")
            self._fail({id: ticket for id, ticket in self._tickets.items() if ticket.model == model}, error)
            return
        self._deliver(deltas)

    def _deliver(self, deltas: Sequence[TextDelta]) -> None:
        """Every ticket has its deltas, and their readers are awake: one call a step for each event loop."""
        touched: dict[int, Ticket] = {}
        for delta in deltas:
            ticket = self._tickets.get(delta.request_id)
            if ticket is not None:
                self._observer.on_delta(delta, ticket.model, ticket.tenant, ticket.adapter)
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
        self._fail(self._tickets, error)
        while not self._inbox.empty():
            match self._inbox.get():
                case _Add(_, ticket):
                    ticket.refuse(error)
                case _Call(_, result, loop):
                    with suppress(RuntimeError):
                        loop.call_soon_threadsafe(_resolve, result, None, error)

    def _fail(self, lost: Mapping[str, Ticket], error: Exception) -> None:
        self._tickets = {id: ticket for id, ticket in self._tickets.items() if id not in lost}
        for ticket in {id(t): t for t in lost.values()}.values():
            ticket.fail(error)

    def _answer(self, call: _Call) -> None:
        try:
            value, error = call.function(), None
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
