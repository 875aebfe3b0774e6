"""The names that requests may call the model and its adapters by."""

from collections.abc import Container
from dataclasses import dataclass

from realm_jax.serving.server.errors import ApiError


@dataclass(frozen=True)
class ModelNames:
    """The names of the model; the first one is shown."""

    names: tuple[str, ...]

    @property
    def shown(self) -> str:
        return self.names[0]

    def resolve(self, name: str | None, adapters: Container[str]) -> str:
        """The name that the answer bears. Raises ApiError 404 for one that nothing has."""
        if name is None:
            return self.shown
        if name in self.names or name in adapters:
            return name
        raise ApiError(
            404,
            f"the model {name[:100]!r} does not exist; GET /v1/models lists those that do",
            param="model",
            code="model_not_found",
        )
