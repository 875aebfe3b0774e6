"""What all routes share: the models, the limits, and whether the server still serves."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import HTTPConnection
from starlette.requests import Request as HTTPRequest
from starlette.types import Receive

from realm_jax.serving.request import Request as EngineRequest
from realm_jax.serving.server.connection import while_connected
from realm_jax.serving.server.engine_thread import EngineThread
from realm_jax.serving.server.errors import Unavailable
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.metrics import Metrics
from realm_jax.serving.server.model_pool import ModelPool
from realm_jax.serving.server.pooled_model import OpenModel, PooledModel, tenant_for
from realm_jax.serving.server.reading import parsed, read_body
from realm_jax.serving.server.tenancy import Tenancy, charge
from realm_jax.serving.server.ticket import Ticket
from realm_jax.serving.tenants import Tenant

T = TypeVar("T")
READERS = 2  # threads that read bodies and write answers: templates and tokenizers hold Python's lock


@dataclass
class Service:
    """The state of one server.

    adapter_folder: where adapters may be loaded from while requests run; None = nowhere.
    hosts: names that the Host header may have, None for any: a page of another site whose name was made to
    point here is refused. active: requests that have not been answered. is_ready: the models to preload are
    loaded. has_failed: they cannot be.
    """

    engine: EngineThread
    pool: ModelPool
    limits: Limits
    metrics: Metrics
    tenancy: Tenancy = field(default_factory=Tenancy)
    adapter_folder: Path | None = None
    hosts: frozenset[str] | None = None
    log_prompts: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    active: int = 0
    is_ready: bool = False
    has_failed: bool = False
    is_draining: bool = False
    _readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(READERS, thread_name_prefix="reader")
    )

    @property
    def status(self) -> str:
        """ok, loading, draining or failed."""
        if self.is_draining:
            return "draining"
        if self.has_failed:
            return "failed"
        return "ok" if self.is_ready else "loading"

    def check_serving(self) -> None:
        """Raises Unavailable until the server is ready, and when it ends."""
        if self.is_draining:
            raise Unavailable("the server is shutting down; try another one")
        if not self.is_ready:
            raise Unavailable("the model is still being loaded; try again later")

    def find(self, name: object, tenant: Tenant) -> PooledModel:
        """As `ModelPool.find`; what is no name is refused later, with its body. Raises Unavailable."""
        self.check_serving()
        return self.pool.find(name if isinstance(name, str) else None, tenant)

    @asynccontextmanager
    async def using(
        self, name: object, tenant: Tenant, receive: Receive | None = None
    ) -> AsyncIterator[OpenModel]:
        """The model of this name, loaded; it stays so while the context is open.

        receive: of a client who may leave while it waits, which is ClientLeft. Raises as `find`, and ApiError
        if the model cannot be loaded.
        """
        model = self.find(name, tenant)
        if model.is_open or receive is None:
            await self.pool.acquire(model)
        else:
            await while_connected(receive, self.pool.acquire(model))
        try:
            assert model.llm is not None
            yield OpenModel(model, model.llm, tenant_for(model, tenant, self.pool.models))
        finally:
            self.pool.release(model)

    async def read(self, request: HTTPRequest) -> Any:
        """The JSON value of a request's body. Raises ApiError or RequestError for what is none."""
        return await self.off_loop(parsed, await read_body(request, self.limits), self.limits)

    async def submit(self, model: OpenModel, requests: Sequence[EngineRequest]) -> Ticket:
        """As `EngineThread.submit`, charged to the tenant; what was not used is given back at the end.

        The model stays in memory until the ticket is closed. Also raises LimitError.
        """
        admission = self.tenancy.limiter.admit(model.tenant, charge(requests, model.llm.model.context))
        prompts = sum(len(request.prompt_ids) for request in requests)
        try:
            ticket = await self.engine.submit(model.name, requests)
        except BaseException:
            admission.settle(0)
            raise
        self.pool.keep(model.pooled)

        def close() -> None:
            admission.settle(prompts + ticket.generated)
            self.pool.release(model.pooled)

        ticket.on_close = close
        return ticket

    async def off_loop(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the function returns, called on a thread for such work."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, function, *arguments)

    def close(self) -> None:
        """No work is taken any more."""
        self._readers.shutdown(wait=False, cancel_futures=True)


def service_of(connection: HTTPConnection) -> Service:
    """The service that a connection came to."""
    return connection.scope["app"].service


def note(connection: HTTPConnection, **fields: Any) -> None:
    """The fields will stand in the connection's log line."""
    connection.scope.setdefault("realm.log", {}).update(fields)
