"""Whose request it is, and what that one may do: the one place that knows of keys."""

from collections.abc import Iterable, Mapping, Sequence

from starlette.requests import HTTPConnection

from realm_jax.errors import AccessError, AuthenticationError
from realm_jax.serving.keys import KeyStore
from realm_jax.serving.request import Request
from realm_jax.serving.tenants import ANONYMOUS, EVERY, Limiter, Tenant


class Tenancy:
    """The tenants of a server. May be called from any thread, but not from an event loop: a key takes time.

    keys: None = there are none, and everyone is the anonymous tenant. tenants: by name; where it is empty,
    every key's tenant is served without limits.
    """

    def __init__(self, keys: KeyStore | None = None, tenants: Mapping[str, Tenant] | None = None) -> None:
        self._keys, self._tenants = keys, tenants or {}
        self.limiter = Limiter()

    @property
    def needs_keys(self) -> bool:
        """Whether requests need a key: as soon as any was ever made."""
        return self._keys is not None and not self._keys.is_empty

    def tenant_of(self, key: str | None) -> Tenant:
        """The tenant whose key it is. Raises AuthenticationError, or AccessError for an unknown tenant."""
        if self._keys is None or self._keys.is_empty:
            return ANONYMOUS
        if key is None:
            raise AuthenticationError("an API key is needed; send it as Authorization: Bearer KEY")
        name = self._keys.verify(key).tenant
        if not self._tenants:
            return Tenant(name, adapters=(EVERY,))
        if name not in self._tenants:
            raise AccessError(f"tenant {name} is not one of this server's; its operator may add it")
        return self._tenants[name]


def find_tenant(connection: HTTPConnection) -> Tenant:
    """The tenant of a connection that was let in."""
    return connection.scope["realm.tenant"]


def key_of(connection: HTTPConnection) -> str | None:
    """The key that a connection's header has."""
    kind, _, key = connection.headers.get("authorization", "").partition(" ")
    return key.strip() if kind.lower() == "bearer" and key.strip() else None


def visible(tenant: Tenant, names: Iterable[str]) -> tuple[str, ...]:
    """The adapters that exist for the tenant: of others it cannot know."""
    return tuple(name for name in list(names) if EVERY in tenant.adapters or name in tenant.adapters)


def charge(requests: Sequence[Request], context: int) -> int:
    """Tokens that the requests may come to."""
    return sum(
        len(r.prompt_ids)
        + r.params.n * (context - len(r.prompt_ids) if r.params.max_tokens is None else r.params.max_tokens)
        for r in requests
    )
