"""Attention block by block, reading only the blocks that are filled: operations that every backend compiles.

B rows, T new tokens, S slots, C cache capacity, N query heads, K kv heads, H head dim, M stacked queries.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.config import BLOCK, MIN_ROWS
from realm_jax.kernels.reference import (
    decode,
    pad_axis,
    product,
    row_sum,
    stack_heads,
    stack_sinks,
    unstack_heads,
)

HIDDEN = -1e30
"""The score of a position that a query does not see: its weight is exactly 0."""


def attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    k_scale: Array | None,
    v_scale: Array | None,
    slots: Array | None,
    positions: Int[Array, "B T"],
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """As `kernels.attention`.

    The softmax runs over blocks of `BLOCK` positions in order, with a running maximum (Milakov and
    Gimelshein 2018; Dao et al. 2022). A block that no row of the call sees is skipped, which changes no
    bit: its weights would be exactly 0, its rescaling exactly 1.
    """
    B, T, N, H = q.shape
    K, C = k.shape[1:3]
    stacked = pad_axis(stack_heads(q, K).astype(_arithmetic(k)), 2, MIN_ROWS)
    at = pad_axis(jnp.tile(positions, (1, N // K)), 1, MIN_ROWS)

    def block(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, out = state
        keys, values = _take(k, slots, B, i), _take(v, slots, B, i)
        scores = product("bkmh,bkch->bkmc", stacked, decode(keys)) * scale
        if k_scale is not None:
            scores = scores * _take(k_scale, slots, B, i)[:, :, None]
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(_visible(at, i * BLOCK, window)[:, None], scores, HIDDEN)
        new = jnp.maximum(best, scores.max(axis=-1))
        weights, rescale = jnp.exp(scores - new[..., None]), jnp.exp(best - new)
        total = total * rescale + row_sum(weights)
        if v_scale is not None:
            weights = weights * _take(v_scale, slots, B, i)[:, :, None]
        values = decode(values)
        part = product("bkmc,bkch->bkmh", weights.astype(values.dtype), values)
        return new, total, out * rescale[..., None] + part

    M = stacked.shape[2]
    state = (*_seen_before(sinks, (B, K, M), T), jnp.zeros((B, K, M, H)))
    _, total, out = jax.lax.fori_loop(*_blocks(positions, C, window), block, state)
    return unstack_heads((out / total[..., None])[:, :, : N // K * T], T)


def _seen_before(sinks: Array | None, shape: tuple[int, int, int], T: int) -> tuple[Array, Array]:
    """The maximum and the total before any block: a sink counts as a position of no value."""
    if sinks is None:
        return jnp.full(shape, HIDDEN), jnp.zeros(shape)
    best = pad_axis(stack_sinks(sinks, shape[1], T), 2, shape[2])
    return jnp.broadcast_to(best, shape), jnp.ones(shape)


def _blocks(positions: Int[Array, "B T"], capacity: int, window: int | None) -> tuple[Array, Array]:
    """The range of blocks that some query sees; idle queries see none."""
    is_real = positions < capacity
    last = jnp.max(jnp.where(is_real, positions, 0))
    if window is None:
        return jnp.zeros((), positions.dtype), last // BLOCK + 1
    first = jnp.min(jnp.where(is_real, positions, last))
    return jnp.maximum(first - window + 1, 0) // BLOCK, last // BLOCK + 1


def _visible(at: Int[Array, "B M"], first: Int[Array, ""], window: int | None) -> Array:
    """[B, M, BLOCK]: whether a query at a position sees a position of the block from `first` on."""
    distance = at[:, :, None] - (first + jnp.arange(BLOCK, dtype=at.dtype))[None, None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def _take(x: Array, slots: Int[Array, "B"] | None, rows: int, block: Int[Array, ""]) -> Array:
    """[B, K, BLOCK, ...]: a block of each row's slot."""
    rest = (0,) * (x.ndim - 3)
    size = (x.shape[1], BLOCK, *x.shape[3:])
    if slots is None:
        return jax.lax.dynamic_slice(x, (0, 0, block * BLOCK, *rest), (rows, *size))
    # slices joined, not a gather: XLA's CPU gather copies number by number
    parts = [jax.lax.dynamic_slice(x, (slots[b], 0, block * BLOCK, *rest), (1, *size)) for b in range(rows)]
    return jnp.concatenate(parts)


def _arithmetic(k: Array) -> jnp.dtype:
    """The type in which a cache's numbers are multiplied."""
    return k.dtype if jnp.issubdtype(k.dtype, jnp.floating) else jnp.dtype(jnp.bfloat16)
