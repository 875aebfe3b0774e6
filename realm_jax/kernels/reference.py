"""Products, attention and sums whose bits do not depend on what else is in the batch.

B rows, T new tokens, C cache capacity, N query heads, K kv heads, H head dim, I in, O out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.config import BLOCK, MIN_ROWS


def row_sum(x: Float[Array, "*lead n"]) -> Float[Array, "*lead"]:
    """The sum of each row, by halving.

    A plain reduction lets the compiler pick an order that changes with the shape around the row; this
    tree depends on the row alone, and zeros appended to the row do not change it.
    """
    width = x.shape[-1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        low, high = x[..., :half], x[..., half:]
        paired = width - half  # the rest of the lower half meets the zeros past the row's end
        x = jnp.concatenate([low[..., :paired] + high, low[..., paired:]], axis=-1)
        width = half
    return x[..., 0]


def matmul(x: Float[Array, "*lead I"], weight: Float[Array, "O I"]) -> Float[Array, "*lead O"]:
    """`x @ weight.T` in float32, from inputs in the weight's type.

    Rows are padded to `MIN_ROWS`: a one-row product rewrites the whole weight on CPU, and sums it in
    another order. The result is asked for in float32, because a bf16 result is many times slower there.
    """
    flat = x.reshape(-1, x.shape[-1]).astype(weight.dtype)
    y = jax.lax.dot_general(
        _pad_axis(flat, 0, MIN_ROWS),
        weight,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y[: flat.shape[0]].reshape(*x.shape[:-1], weight.shape[0])


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Causal attention of each query to the cache positions up to its own, in float32.

    A query at position p sees positions max(0, p - window + 1) .. p. Query heads that share a kv head
    are stacked into one product. The sum over C runs in blocks of `BLOCK`, so that a larger capacity
    gives the same bits.
    """
    B, T, N, H = q.shape
    K, C = k.shape[1:3]
    group = N // K
    stacked = q.reshape(B, T, K, group, H).transpose(0, 2, 3, 1, 4).reshape(B, K, group * T, H)
    stacked = _pad_axis(stacked.astype(k.dtype), 2, MIN_ROWS)
    at = _pad_axis(jnp.tile(positions, (1, group)), 1, MIN_ROWS)

    scores = _product("bkmh,bkch->bkmc", stacked, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(_visible(at, C, window)[:, None], scores, -1e30)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    out = _weighted_values(weights.astype(v.dtype), v) / row_sum(weights)[..., None]
    return out[:, :, : group * T].reshape(B, K, group, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _visible(at: Int[Array, "B M"], capacity: int, window: int | None) -> Array:
    """[B, M, C]: whether a query at a position sees a cache position."""
    distance = at[:, :, None] - jnp.arange(capacity, dtype=at.dtype)[None, None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _weighted_values(weights: Float[Array, "B K M C"], v: Float[Array, "B K C H"]) -> Float[Array, "B K M H"]:
    """`weights @ v`, block by block, the blocks added by halving."""
    B, K, M, C = weights.shape
    blocks = C // BLOCK
    if blocks == 1:
        return _product("bkmc,bkch->bkmh", weights, v)
    parts = _product(
        "bkmnc,bknch->bknmh",
        weights.reshape(B, K, M, blocks, BLOCK),
        v.reshape(B, K, blocks, BLOCK, v.shape[-1]),
    )
    return row_sum(jnp.moveaxis(parts, 2, -1))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _pad_axis(x: Array, axis: int, least: int) -> Array:
    """`x` with zeros appended until `axis` has `least` entries."""
    missing = least - x.shape[axis]
    if missing <= 0:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
