"""What all routes share: the engine, the names, the limits, and whether the server still serves."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import HTTPConnection

from realm_jax.llm import LLM
from realm_jax.serving.request import Request as EngineRequest
from realm_jax.serving.server.engine_thread import EngineThread
from realm_jax.serving.server.errors import Unavailable
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.metrics import Metrics
from realm_jax.serving.server.naming import ModelNames
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
    point here is refused. active: requests that have not been answered.
    """

    engine: EngineThread
    names: ModelNames
    limits: Limits
    metrics: Metrics
    tenancy: Tenancy = field(default_factory=Tenancy)
    adapter_folder: Path | None = None
    hosts: frozenset[str] | None = None
    log_prompts: bool = False
    started: int = field(default_factory=lambda: int(time.time()))
    active: int = 0
    is_draining: bool = False
    _readers: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(READERS, thread_name_prefix="reader")
    )

    @property
    def status(self) -> str:
        """ok, loading, draining or failed."""
        if self.is_draining:
            return "draining"
        if self.engine.failure is not None:
            return "failed"
        return "ok" if self.engine.is_ready else "loading"

    def require_llm(self) -> LLM:
        """The model. Raises Unavailable while it loads, and when the server ends."""
        if self.is_draining:
            raise Unavailable("the server is shutting down; try another one")
        return self.engine.llm

    async def submit(self, requests: Sequence[EngineRequest], tenant: Tenant) -> Ticket:
        """As `EngineThread.submit`, charged to the tenant; what was not used is given back at the end.

        Also raises LimitError.
        """
        admission = self.tenancy.limiter.admit(tenant, charge(requests, self.engine.llm.model.context))
        prompts = sum(len(request.prompt_ids) for request in requests)
        try:
            ticket = await self.engine.submit(requests)
        except BaseException:
            admission.settle(0)
            raise
        ticket.on_close = lambda: admission.settle(prompts + ticket.generated)
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
