"""Whose request it is: the one place that knows."""

from dataclasses import dataclass

from starlette.requests import HTTPConnection


@dataclass(frozen=True)
class Tenant:
    """Who asks. What is computed for one tenant's prompts is never reused for another's."""

    name: str = ""


ANONYMOUS = Tenant()


def find_tenant(connection: HTTPConnection) -> Tenant:
    """The tenant of a connection: there are no keys, so everyone is the anonymous one."""
    del connection
    return ANONYMOUS
