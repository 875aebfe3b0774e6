"""The names that requests may call the model and its adapters by."""

from collections.abc import Container
from dataclasses import dataclass

from realm_jax.serving.server.errors import no_such_model
from realm_jax.serving.tenants import EVERY, Tenant


@dataclass(frozen=True)
class ModelNames:
    """The names of the model; the first one is shown."""

    names: tuple[str, ...]

    @property
    def shown(self) -> str:
        return self.names[0]

    def visible(self, tenant: Tenant) -> tuple[str, ...]:
        """Those that exist for the tenant."""
        return tuple(name for name in self.names if EVERY in tenant.models or name in tenant.models)

    def resolve(self, name: str | None, adapters: Container[str], tenant: Tenant) -> str:
        """The name that the answer bears. adapters: those that exist for the tenant.

        Raises ApiError 404 for one that nothing has, AccessError if the tenant may not use the model.
        """
        if name is None:
            tenant.check_model(self.shown)
            return self.shown
        if name in self.visible(tenant) or name in adapters:
            return name
        raise no_such_model(name)
