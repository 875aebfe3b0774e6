"""Weight nodes: what stands on the right of `x @ kernel`. The node decides how the product is made.

A node is a pytree with a logical `shape` (in, out), `__rmatmul__`, and, where it can be an embedding,
`rows`. Layers never ask which node they hold. Those here are plain formulas for every backend;
`native_nodes` has those of the C++ kernels.
"""

from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.kernels import grouped_matmul, layer_norm, matmul, per_head_matmul, rms_norm
from realm_jax.kernels.int8 import int8_matmul
from realm_jax.kernels.quantized import grouped_quantized_matmul, quantized_matmul
from realm_jax.kernels.tiles import TileFormat, tile_rows, tiles_matmul
from realm_jax.kernels.words import WordFormat, word_rows
from realm_jax.rope import angles, rotate


@runtime_checkable
class Kernel(Protocol):
    """A projection from `shape[0]` inputs to `shape[1]` outputs; products are float32."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]: ...


@struct.dataclass
class Dense:
    """A plain matrix in GGUF's own order, multiplied in its own type."""

    __array_ufunc__ = None  # NumPy operands on the left defer to __rmatmul__ too

    weight: jax.Array  # [O, I]

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[-1], self.weight.shape[-2]

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return matmul(x, self.weight)

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """As `experts.Groupable`, of weights [E, O, I]."""
        return grouped_matmul(x, self.weight, expert)

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

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """As `experts.Groupable`, where the kernel is; biases [E, O]."""
        kernel: Any = self.kernel
        return kernel.grouped(x, expert) + self.bias[expert][:, None]


@struct.dataclass
class PerHead:
    """A plain matrix for each head, each multiplied by its own row of inputs."""

    __array_ufunc__ = None

    weight: jax.Array  # [N, O, I]

    @property
    def shape(self) -> tuple[int, int, int]:
        heads, outputs, inputs = self.weight.shape
        return heads, inputs, outputs

    def __rmatmul__(self, x: Float[Array, "*lead N I"]) -> Float[Array, "*lead N O"]:
        rows = x.reshape(-1, *x.shape[-2:]).swapaxes(0, 1)
        y = per_head_matmul(rows, self.weight)
        return y.swapaxes(0, 1).reshape(*x.shape[:-1], y.shape[-1])


@struct.dataclass
class Quantized:
    """A matrix in GGML's own codes and scales, multiplied in float32."""

    __array_ufunc__ = None

    tiles: jax.Array  # uint8 [L, bytes]
    form: TileFormat = struct.field(pytree_node=False)
    outputs: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.inputs, self.outputs

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return tiles_matmul(x, self.tiles, self.form, self.outputs)

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """The rows of an embedding table, in float32."""
        return tile_rows(self.tiles, self.form, ids)


@struct.dataclass
class Words:
    """A matrix in GGML's own codes and scales, multiplied in `dtype` by the kernels for GPU and TPU."""

    __array_ufunc__ = None

    words: jax.Array  # int32 [units, height, O]
    form: WordFormat = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.inputs, self.words.shape[-1]

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return quantized_matmul(x, self.words, self.form, dtype=self.dtype, kernels="pallas")

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """As `experts.Groupable`, of words [E, units, height, O]."""
        return grouped_quantized_matmul(x, self.words, expert, self.form, dtype=self.dtype, kernels="pallas")

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """The rows of an embedding table, in float32."""
        return word_rows(self.words, self.form, ids)


@struct.dataclass
class Int8:
    """A matrix rounded to int8 under a scale for each chunk of inputs, multiplied in int8."""

    __array_ufunc__ = None

    codes: tuple[jax.Array, ...]  # a chunk each, int8 [O, K]
    scales: jax.Array  # [C, O]

    @property
    def shape(self) -> tuple[int, int]:
        outputs, chunk = self.codes[0].shape
        return len(self.codes) * chunk, outputs

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return int8_matmul(x, self.codes, self.scales)


@struct.dataclass
class Stacked:
    """Projections of the same inputs, their outputs one after another: parts of different types."""

    __array_ufunc__ = None

    parts: tuple[Kernel, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].shape[0], sum(part.shape[1] for part in self.parts)

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return jnp.concatenate([x @ part for part in self.parts], axis=-1)

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """As `experts.Groupable`, where the parts are."""
        parts: tuple[Any, ...] = self.parts
        return jnp.concatenate([part.grouped(x, expert) for part in parts], axis=-1)


@struct.dataclass
class Scale:
    """The learned factors of a norm."""

    weight: jax.Array  # [D]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def normalize(self, x: Float[Array, "*lead D"], eps: float) -> Float[Array, "*lead D"]:
        """The rows at root mean square 1, times the factors."""
        return rms_norm(x, self.weight, eps)


@struct.dataclass
class CenteredScale(Scale):
    """The learned factors of a norm that subtracts the mean, and its bias: [D], or [N, D] of each head."""

    bias: jax.Array

    def normalize(self, x: Float[Array, "*lead D"], eps: float) -> Float[Array, "*lead D"]:
        """The rows at mean 0 and variance 1, times the factors, plus the bias."""
        return layer_norm(x, self.weight, self.bias, eps)


@struct.dataclass
class Rotation:
    """The turns of a call's positions."""

    cos: jax.Array  # [B, T, P]
    sin: jax.Array  # [B, T, P]
    interleaved: bool = struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """The heads, turned."""
        return rotate(x, self.cos, self.sin, interleaved=self.interleaved)


@struct.dataclass
class Rotary:
    """How one kind of layer turns positions into angles."""

    rotation: ClassVar[type[Rotation]] = Rotation

    frequency: jax.Array  # [P] angle per position
    magnitude: float = struct.field(pytree_node=False)
    interleaved: bool = struct.field(pytree_node=False)

    def at(self, positions: Int[Array, "B T"]) -> Rotation:
        """The turns of these positions."""
        return self.rotation(*angles(positions, self.frequency, self.magnitude), self.interleaved)
