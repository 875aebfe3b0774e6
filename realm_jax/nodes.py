"""Weight nodes: what stands on the right of `x @ kernel`. The node decides how the product is made.

A node is a pytree with a logical `shape` (in, out), `__rmatmul__`, and, where it can be an embedding,
`rows`. Storage is GGUF's own `[out, in]`. Layers never ask which node they hold.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.kernels import matmul


@runtime_checkable
class Kernel(Protocol):
    """A projection from `shape[0]` inputs to `shape[1]` outputs; products are float32."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]: ...


@struct.dataclass
class Dense:
    """A plain matrix, multiplied in its own type."""

    __array_ufunc__ = None  # NumPy operands on the left defer to __rmatmul__ too

    weight: jax.Array  # [O, I]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[1], self.weight.shape[0]

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return matmul(x, self.weight)

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """The rows of an embedding table, in float32."""
        return self.weight[ids].astype(jnp.float32)


@struct.dataclass
class Biased:
    """A projection with a bias."""

    __array_ufunc__ = None

    kernel: Kernel
    bias: jax.Array  # [O]

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernel.shape

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        y = x @ self.kernel
        return y + jnp.broadcast_to(self.bias, y.shape)
