"""A weight node with adapters of each row: what a bank's slots add to a projection.

B rows, A adapters of a row, L slots, N numbers of a slot.
"""

from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float

from realm_jax.kernels.low_rank import LowRankForm, low_rank
from realm_jax.kernels.native import calls


@struct.dataclass
class AdapterRows:
    """The adapters of each row: slots of the bank, 0 for none, and what each is multiplied by."""

    index: Any  # [B, A] int32, of JAX or NumPy
    scale: Any  # [B, A] float32

    def first(self, width: int) -> "AdapterRows":
        """The first `width` adapters of each row."""
        return AdapterRows(self.index[:, :width], self.scale[:, :width])


@struct.dataclass
class Banked:
    """A projection and what the adapters of each row add to it."""

    __array_ufunc__ = None

    base: Any  # a Kernel; before a mesh takes it apart, each device's
    factors: Any  # [L, N]
    ranks: jax.Array  # [L, projections]
    rows: AdapterRows
    form: LowRankForm = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def __rmatmul__(self, x: Float[Array, "B *lead I"]) -> Float[Array, "B *lead O"]:
        return x @ self.base + low_rank(x, self.factors, self.rows.index, self.rows.scale, self.form)


@struct.dataclass
class NativeBanked(Banked):
    """The same by the C++ kernel, of factors in bf16 pairs."""

    def __rmatmul__(self, x: Float[Array, "B *lead I"]) -> Float[Array, "B *lead O"]:
        y = x @ self.base
        return calls.add_low_rank(y, x, self.factors, self.ranks, self.rows.index, self.rows.scale, self.form)
