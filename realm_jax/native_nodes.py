"""Weight nodes multiplied by the C++ kernels: the same arrays as in `nodes`, another product."""

from typing import ClassVar

from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.config import TILE
from realm_jax.kernels.native import calls
from realm_jax.nodes import Dense, Quantized, Rotary, Rotation, Scale


@struct.dataclass
class NativeDense(Dense):
    """A bf16 matrix. Tiles of prompts go to XLA, whose product of many rows is faster.

    Which it is depends on the tokens of one sequence, never on the batch: so bits do not either.
    """

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        if x.ndim > 2 and x.shape[-2] >= TILE:
            return super().__rmatmul__(x)
        return calls.matmul(x.reshape(-1, x.shape[-1]), self.weight).reshape(
            *x.shape[:-1], self.weight.shape[0]
        )  # pyright: ignore[reportAttributeAccessIssue]

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """As `experts.Groupable`, of weights [E, O, I]."""
        return calls.grouped_matmul(x, self.weight, expert)  # pyright: ignore[reportReturnType]


@struct.dataclass
class NativeQuantized(Quantized):
    """Codes multiplied by inputs in int8, under a scale for each 32 of them."""

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return calls.tiles_matmul(x, self.tiles, self.form, self.outputs)

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """As `experts.Groupable`, of tiles [E, L, bytes]."""
        return calls.grouped_tiles_matmul(x, self.tiles, expert, self.form, self.outputs)


@struct.dataclass
class NativeScale(Scale):
    """The factors of a norm that the C++ kernel computes."""

    def normalize(self, x: Float[Array, "*lead D"], eps: float) -> Float[Array, "*lead D"]:
        """As `Scale.normalize`."""
        return calls.rms_norm(x, self.weight, eps)  # pyright: ignore[reportReturnType]


@struct.dataclass
class NativeRotation(Rotation):
    """Turns that the C++ kernel makes."""

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """As `Rotation`."""
        return calls.rotate(x, self.cos, self.sin, self.interleaved)  # pyright: ignore[reportReturnType]


@struct.dataclass
class NativeRotary(Rotary):
    """As `Rotary`, for the C++ kernel."""

    rotation: ClassVar[type[Rotation]] = NativeRotation
