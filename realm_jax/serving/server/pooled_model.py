"""A model that a server serves, in memory or not."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from realm_jax.llm import LLM
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.tenancy import visible
from realm_jax.serving.tenants import Tenant

Status = Literal["unloaded", "loading", "loaded"]
"""As llama-server's router says it."""


class Loader(Protocol):
    """How a model comes into memory. adapters: paths by the names that requests may use."""

    @property
    def is_local(self) -> bool:
        """Whether its files are here: what is not is fetched when it is first loaded."""
        ...

    def needed_bytes(self, adapters: Mapping[str, Path], memory_limit: int) -> int:
        """What it needs. Raises CapacityError where that is more than that limit."""
        ...

    def load(self, adapters: Mapping[str, Path], memory_limit: int | None) -> LLM:
        """The model, ready to generate, in so many bytes; None = no limit."""
        ...


@dataclass(frozen=True)
class InMemory:
    """Loads a model that is in memory already, as `Loader` says: it needs nothing more."""

    llm: LLM
    is_local = True

    def needed_bytes(self, adapters: Mapping[str, Path], memory_limit: int) -> int:
        """Nothing."""
        return 0

    def load(self, adapters: Mapping[str, Path], memory_limit: int | None) -> LLM:
        """The model."""
        return self.llm


@dataclass(eq=False)
class PooledModel:
    """A model and what the pool knows of it; on the event loop alone.

    preload: whether it is loaded when the server starts. users: requests that need it in memory.
    is_leaving: it makes room as soon as those have ended, and takes no others. size: bytes that are counted
    for it. waiting: requests that wait until it is loaded.
    """

    names: ModelNames
    loader: Loader
    adapters: dict[str, Path] = field(default_factory=dict)
    preload: bool = False
    llm: LLM | None = None
    users: int = 0
    used: float = 0.0  # when, last
    is_leaving: bool = False
    has_failed: bool = False
    size: int = 0
    context: int | None = None  # None before it was first loaded
    waiting: "list[asyncio.Future[None]]" = field(default_factory=list)
    loading: "asyncio.Task[None] | None" = None
    unloading: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        """The name that is shown."""
        return self.names.shown

    @property
    def is_open(self) -> bool:
        """Whether requests may use it at once."""
        return self.llm is not None and not self.is_leaving

    @property
    def status(self) -> Status:
        if self.llm is not None:
            return "loaded"
        return "unloaded" if self.loading is None else "loading"

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Those that requests may name."""
        return tuple(self.adapters if self.llm is None else self.llm.engine.adapters.named)

    def visible_adapters(self, tenant: Tenant) -> tuple[str, ...]:
        """Those that exist for the tenant: listed by name, or all of a model that it may use."""
        if not self.names.visible(tenant):
            return tuple(name for name in self.adapter_names if name in tenant.adapters)
        return visible(tenant, self.adapter_names)


@dataclass(frozen=True)
class OpenModel:
    """A model in use: it stays in memory until that ends. tenant: its user, as it is for this model."""

    pooled: PooledModel
    llm: LLM
    tenant: Tenant

    @property
    def name(self) -> str:
        return self.pooled.name

    @property
    def names(self) -> ModelNames:
        return self.pooled.names


def tenant_for(model: PooledModel, tenant: Tenant, others: "tuple[PooledModel, ...]") -> Tenant:
    """The tenant, without its default adapter if that is another model's."""
    name = tenant.default_adapter
    if name is None or name in model.adapter_names:
        return tenant
    is_anothers = any(name in other.adapter_names for other in others)
    return replace(tenant, default_adapter=None) if is_anothers else tenant
