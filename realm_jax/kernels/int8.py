"""Products in int8 of rounded rows and rounded weights, in operations that every backend compiles.

C chunks of K inputs each make up the I inputs; O outputs. The codes of each chunk are an array of their own:
of one array, XLA on CPU would copy the slices at every call, which takes longer than the product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from realm_jax.config import MIN_ROWS
from realm_jax.kernels.reference import pad_axis


def int8_matmul(
    x: Float[Array, "*lead I"], codes: tuple[Int8[Array, "O K"], ...], scales: Float[Array, "C O"]
) -> Float[Array, "*lead O"]:
    """`x @ weight.T`, where weight is scale * code and each row of x is rounded to int8, chunk by chunk.

    A row's bits depend on that row alone. The gradient is as if x had not been rounded.
    """
    y = _int8_matmul(x.reshape(-1, x.shape[-1]).astype(jnp.float32), codes, scales)
    return y.reshape(*x.shape[:-1], codes[0].shape[0])  # pyright: ignore[reportAttributeAccessIssue]


@jax.custom_vjp
def _int8_matmul(x: Array, codes: tuple[Array, ...], scales: Array) -> Array:
    chunks = jnp.split(pad_axis(x, 0, MIN_ROWS), len(codes), axis=1)
    total = _chunk_product(chunks[0], codes[0], scales[0])
    for chunk, code, scale in zip(chunks[1:], codes[1:], scales[1:], strict=True):
        total = total + _chunk_product(chunk, code, scale)
    return total[: x.shape[0]]


def _chunk_product(x: Float[Array, "M K"], codes: Int8[Array, "O K"], scale: Float[Array, "O"]) -> Array:
    """Sums of at most 512 products of codes are below 2^24: exact in float32."""
    rows, step = round_rows(x)
    sums = jax.lax.dot_general(rows, codes, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return sums.astype(jnp.float32) * step * scale[None]


def round_rows(x: Float[Array, "M K"]) -> tuple[Int8[Array, "M K"], Float[Array, "M 1"]]:
    """Codes from -127 to 127 and what one of them is worth; a row too small for float32's range is zero."""
    step = jnp.abs(x).max(axis=1, keepdims=True) / 127
    step = jnp.where(step < jnp.finfo(jnp.float32).tiny, 1.0, step)  # NaN stays: the product is NaN too
    return jnp.round(x / step).astype(jnp.int8), step


def dequantize(codes: tuple[Int8[Array, "O K"], ...], scales: Float[Array, "C O"]) -> Float[Array, "O I"]:
    """The weight in float32."""
    columns = [code.astype(jnp.float32) * scale[:, None] for code, scale in zip(codes, scales, strict=True)]
    return jnp.concatenate(columns, axis=1)


def _forward(
    x: Array, codes: tuple[Array, ...], scales: Array
) -> tuple[Array, tuple[tuple[Array, ...], Array]]:
    return _int8_matmul(x, codes, scales), (codes, scales)  # pyright: ignore[reportReturnType]


def _backward(kept: tuple[tuple[Array, ...], Array], cotangent: Array) -> tuple[Array, None, None]:
    return jnp.matmul(cotangent, dequantize(*kept), precision=jax.lax.Precision.HIGHEST), None, None


_int8_matmul.defvjp(_forward, _backward)
