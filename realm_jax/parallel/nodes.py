"""Weight nodes of a mesh: what stands on several devices, and what they make of it together.

Letters: n devices, I inputs, O outputs, V vocabulary.
"""

from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.experts import Experts

AXIS = "tp"
"""The mesh's one axis."""

ONE_STEP = 1 << 16
"""Sums of so few numbers go to every device at once; larger ones in two steps, which send less."""


@struct.dataclass
class Split:
    """A node of which each device has its own: every array is those of the devices, one after another."""

    node: Any


@struct.dataclass
class Summed:
    """A projection of each device's own inputs, summed over the devices."""

    __array_ufunc__ = None

    kernel: Any

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernel.shape

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return device_sum(x @ self.kernel)


@struct.dataclass
class SummedExperts:
    """Experts of which each device has some of the features, summed over the devices."""

    experts: Experts

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts.shape

    def mix(self, x: Float[Array, "*lead D"], *how: Any) -> Float[Array, "*lead D"]:
        """As `Experts.mix`."""
        return device_sum(self.experts.mix(x, *how))


@struct.dataclass
class Vocabulary:
    """An embedding or a head of which each device has some tokens, in order; the last ones may be none."""

    __array_ufunc__ = None

    kernel: Any
    size: int = struct.field(pytree_node=False)  # of the whole

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernel.shape[0], self.size

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """The rows of the embedding, each from the device that has it."""
        count = self.kernel.shape[1]
        mine = ids - jax.lax.axis_index(AXIS).astype(ids.dtype) * count
        is_mine = (mine >= 0) & (mine < count)
        rows = self.kernel.rows(jnp.clip(mine, 0, count - 1))
        return jax.lax.psum(jnp.where(is_mine[..., None], rows, 0.0), AXIS)  # exact: the others add zeros

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead V"]:
        scores = jax.lax.all_gather(x @ self.kernel, AXIS, axis=x.ndim - 1, tiled=True)
        return scores[..., : self.size]


def device_sum(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The sum over the devices in their order, the same bits on each.

    An all-reduce adds in an order that may depend on an element's place, and so on the batch.
    """
    n = jax.lax.axis_size(AXIS)
    if x.size <= ONE_STEP:
        return reduce(add, jax.lax.all_gather(x, AXIS))
    flat = x.reshape(-1)
    pieces = jnp.pad(flat, (0, -flat.size % n)).reshape(n, -1)
    mine = reduce(add, jax.lax.all_to_all(pieces, AXIS, 0, 0))  # one piece of the sum
    return jax.lax.all_gather(mine, AXIS, tiled=True)[: x.size].reshape(x.shape)
