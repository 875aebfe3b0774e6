"""Weight nodes with low-rank changes, as plain formulas: what training differentiates.

I inputs, O outputs, R rank, P outputs of a part.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.kernels.reference import product
from realm_jax.nodes import Kernel


@runtime_checkable
class Change(Protocol):
    """What is added to the product of one GGUF tensor."""

    def of(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead P"]: ...

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]: ...


@struct.dataclass
class Delta:
    """The change `scale * b @ a` of a matrix, all in float32."""

    a: jax.Array  # [R, I]
    b: jax.Array  # [P, R]
    scale: jax.Array  # []

    def of(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead P"]:
        """What the change adds to `x @ weight.T`."""
        return self.scale * _product(_product(x, self.a), self.b)

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """What the change adds to these rows of an embedding table."""
        return self.scale * _product(self.b[ids], self.a.T)


@struct.dataclass
class Adapted:
    """A frozen matrix whose outputs are those of one or more GGUF tensors, some of them changed."""

    __array_ufunc__ = None

    base: Kernel
    changes: tuple[Change | None, ...]  # one a tensor; None: as the base has it
    widths: tuple[int, ...] = struct.field(pytree_node=False)  # P of each tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        added = [
            jnp.zeros((*x.shape[:-1], width)) if change is None else change.of(x)
            for change, width in zip(self.changes, self.widths, strict=True)
        ]
        return x @ self.base + jnp.concatenate(added, axis=-1)

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """The rows of an embedding table, in float32."""
        rows = self.base.rows(ids)  # pyright: ignore[reportAttributeAccessIssue]: a table's nodes have them
        (change,) = self.changes
        return rows if change is None else rows + change.rows(ids)


def _product(x: Float[Array, "*lead I"], weight: Float[Array, "O I"]) -> Float[Array, "*lead O"]:
    return product("...i,oi->...o", x, weight)
