"""The models of a server: loaded when they are first asked for, unloaded when idle, within a memory budget.

All that is known of them is the event loop's; files are read and memory is given back on a thread of the
pool's own, one model after another, while the engine's thread steps the models that are loaded.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from realm_jax.errors import CapacityError, RealmError
from realm_jax.llm import LLM
from realm_jax.runtime import collect_garbage, giving_memory_back
from realm_jax.serving.server.engine_thread import EngineThread
from realm_jax.serving.server.errors import Unavailable, no_such_model, not_loaded
from realm_jax.serving.server.logs import event, failed
from realm_jax.serving.server.pooled_model import PooledModel
from realm_jax.serving.tenants import Tenant

T = TypeVar("T")
CLOCK = 0.001  # seconds that a timer may be early


class Observer(Protocol):
    """Who hears which models are in memory."""

    def on_memory(self, model: str, *, is_loaded: bool) -> None: ...


class ModelPool:
    """Owns the loaded models. All methods are the event loop's, but `stop`.

    memory: bytes that all loaded models may need together; None = no limit. idle_seconds: a model that
    nobody used for so long is unloaded; None = never.

    Loads go one after another, in the order of their first requests. Where there is no room, the models
    used longest ago leave, idle ones first; one with running requests takes no new ones and leaves when it
    has ended those, so that nobody waits for ever. Its new requests wait for their turn again.
    """

    def __init__(
        self,
        models: Sequence[PooledModel],
        engine: EngineThread,
        observer: Observer,
        *,
        memory: int | None = None,
        idle_seconds: float | None = None,
    ) -> None:
        self.models = tuple(models)
        self._engine, self._observer = engine, observer
        self._memory, self._idle_seconds = memory, idle_seconds
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._work: Future[Any] | None = None
        self._is_closed = False

    async def start(self) -> None:
        """The models to preload are loaded.

        Raises CapacityError for a model here that can never fit, or if those to preload do not fit together;
        if none of these can be loaded, what the first failed with.
        """
        if self._memory is not None:
            await self._check_sizes(self._memory)
        errors: list[BaseException] = []
        wanted = [model for model in self.models if model.preload]
        for model in wanted:
            try:
                async with self.using(model):
                    pass
            except Unavailable:
                raise
            except Exception as error:  # told by the log; the others serve
                errors.append(error.__cause__ or error)
        if errors and len(errors) == len(wanted):
            raise errors[0]

    async def _check_sizes(self, memory: int) -> None:
        preloaded, errors = 0, list[RealmError]()
        for model in self.models:
            try:
                if model.loader.is_local:
                    needed = await self._off_loop(model.loader.needed_bytes, dict(model.adapters), memory)
                    preloaded += needed * model.preload
            except CapacityError as error:
                raise CapacityError(f"model {model.name}: {error}") from error
            except RealmError as error:  # of this model alone, told again when it is asked for
                errors.append(error)
        if len(errors) == len(self.models):
            raise errors[0]
        if preloaded > memory:
            raise CapacityError(
                f"the models to preload need {preloaded / 1e6:,.1f} MB together; memory is "
                f"{memory / 1e6:,.1f} MB (raise --memory, or preload fewer)"
            )

    def find(self, name: str | None, tenant: Tenant) -> PooledModel:
        """The model of this name, or that has an adapter of this name, if that exists for the tenant.

        None: that of the tenant's default adapter, or the first that it may use.
        Raises ApiError 404 for a name that nothing has, AccessError if there is none for the tenant.
        """
        if name is None:
            own = (m for m in self.models if tenant.default_adapter in m.adapter_names)
            usable = (m for m in self.models if m.names.visible(tenant))
            if (model := next(own, None) or next(usable, None)) is None:
                tenant.check_model(self.models[0].name)
                raise AssertionError("a tenant who may use a name sees it")
            return model
        for model in self.models:
            if name in model.names.visible(tenant) or name in model.visible_adapters(tenant):
                return model
        raise no_such_model(name)

    @contextlib.asynccontextmanager
    async def using(self, model: PooledModel) -> AsyncIterator[LLM]:
        """The model, loaded; it stays so while the context is open.

        Raises ApiError if it cannot be loaded, Unavailable if the server ends.
        """
        await self.acquire(model)
        try:
            assert model.llm is not None
            yield model.llm
        finally:
            self.release(model)

    async def acquire(self, model: PooledModel) -> None:
        """The model is loaded and has one user more. Raises as `using`."""
        if self._is_closed:
            raise Unavailable("the server is shutting down; try another one")
        if model.is_open:
            self.keep(model)
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        model.waiting.append(waiter)
        if model.loading is None:
            model.loading = self._begin(self._load(model))
        try:
            await waiter
        except asyncio.CancelledError:  # its client has left
            if waiter in model.waiting:
                model.waiting.remove(waiter)
                self._freed.set()  # perhaps nobody waits for room any more
            elif waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                self.release(model)
            raise

    def keep(self, model: PooledModel) -> None:
        """A model in memory has one user more."""
        model.users += 1
        self._forget_timer(model)

    def release(self, model: PooledModel) -> None:
        """The model has one user less."""
        loop = asyncio.get_running_loop()
        model.users -= 1
        model.used = loop.time()
        if model.users:
            return
        self._freed.set()
        self._watch(model)

    def _watch(self, model: PooledModel) -> None:
        """The idle model leaves in time, unless it is used before."""
        if self._idle_seconds is None or self._is_closed:
            return
        self._forget_timer(model)
        loop = asyncio.get_running_loop()
        model.unloading = loop.call_later(self._idle_seconds, lambda: self._begin(self._unload_idle(model)))

    def _forget_timer(self, model: PooledModel) -> None:
        if model.unloading is not None:
            model.unloading.cancel()
            model.unloading = None

    def _begin(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _load(self, model: PooledModel) -> None:
        """Those who wait for the model have it, or the reason why not."""
        try:
            async with self._turn:
                if model.llm is None and model.waiting:
                    await self._bring(model)
                if model.llm is not None:
                    self._grant(model)
        except Exception as error:  # theirs who wait; the next request may try again
            model.has_failed = True
            if isinstance(error, RealmError):
                event("loading failed", model=model.name, error=str(error))
            else:
                failed("loading failed", error, model=model.name)
            self._refuse(model, error)
        finally:
            model.loading = None

    async def _bring(self, model: PooledModel) -> None:
        """The model is in memory, if still somebody wants it when there is room."""
        adapters, limit = dict(model.adapters), self._memory
        if self._memory is not None:
            # first: a file that is broken or too large makes nobody leave
            model.size = await self._off_loop(model.loader.needed_bytes, adapters, self._memory)
            if not await self._make_room(model, self._memory):
                return
            if len(self.models) > 1:
                limit = model.size
        llm = await self._off_loop(model.loader.load, adapters, limit)
        await self._engine.attach(model.name, llm)
        model.llm, model.context, model.has_failed = llm, llm.model.context, False
        self._observer.on_memory(model.name, is_loaded=True)
        model.used = asyncio.get_running_loop().time()
        self._watch(model)

    def _grant(self, model: PooledModel) -> None:
        waiting, model.waiting = model.waiting, []
        for waiter in waiting:
            if not waiter.done():
                self.keep(model)
                waiter.set_result(None)

    def _refuse(self, model: PooledModel, why: Exception) -> None:
        waiting, model.waiting = model.waiting, []
        for waiter in waiting:
            if not waiter.done():
                error = why if isinstance(why, Unavailable) else not_loaded(model.name)
                error.__cause__ = why if error is not why else None
                waiter.set_exception(error)

    async def _make_room(self, model: PooledModel, memory: int) -> bool:
        """Whether the model fits beside those that are loaded: others have left, unless nobody waits."""
        while sum(m.size for m in self._loaded) + model.size > memory:
            victim = min(self._loaded, key=lambda m: (m.users > 0, m.used))
            victim.is_leaving = True
            try:
                while victim.users and model.waiting:
                    self._freed.clear()
                    await self._freed.wait()
                if not model.waiting:
                    return False
                await self._unload(victim)
            finally:
                victim.is_leaving = False
        return True

    @property
    def _loaded(self) -> list[PooledModel]:
        return [model for model in self.models if model.llm is not None]

    async def _unload_idle(self, model: PooledModel) -> None:
        async with self._turn:
            idle = asyncio.get_running_loop().time() - model.used + CLOCK
            if model.llm is not None and not model.users and idle >= (self._idle_seconds or 0):
                await self._unload(model)

    async def _unload(self, model: PooledModel) -> None:
        """The model's memory is the system's again; nobody uses it."""
        self._forget_timer(model)
        model.llm = None
        self._observer.on_memory(model.name, is_loaded=False)
        with giving_memory_back():
            await self._engine.detach(model.name)
            await self._off_loop(collect_garbage)
        event("unloaded", model=model.name)

    async def _off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        work = self._work = self._thread.submit(function, *arguments)
        try:
            return await asyncio.wrap_future(work)
        finally:
            if work.done():  # else it goes on, and `stop` waits for it
                self._work = None

    def close(self) -> None:
        """Nobody waits any more, and nothing is loaded or unloaded."""
        self._is_closed = True
        error = Unavailable("the server is shutting down; try another one")
        for task in self._tasks:
            task.cancel()
        for model in self.models:
            self._forget_timer(model)
            self._refuse(model, error)

    def stop(self, seconds: float = 10.0) -> bool:
        """Whether the pool's thread has nothing to do any more, in so many seconds. From any thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        work = self._work
        return work is None or work.done() or bool(wait([work], seconds).done)
