"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024): a memory that decays, and is corrected at a key.

Of each head: S' = a S, then S = S' + k (b (v - S'^T k))^T, and what is read is S^T q. B rows, T tokens,
H heads, K key dim, V value dim. All in float32; padding has a = b = 0 as logarithm and strength, and leaves
the memory as it was.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from realm_jax.kernels import row_sum
from realm_jax.kernels.reference import product


@struct.dataclass
class Tokens:
    """What a delta rule is given of each token."""

    query: jax.Array  # [B, T, H, K]
    key: jax.Array  # [B, T, H, K]
    value: jax.Array  # [B, T, H, V]
    decay: jax.Array  # [B, T, H] the logarithm of a
    strength: jax.Array  # [B, T, H] b


@struct.dataclass
class Tile:
    """What can be computed of tiles before the memory that they meet is known (the paper's section 3.3).

    With the memory S at the tile's start, the corrections are own - seen S, and the outputs
    read S + within (own - seen S).
    """

    own: jax.Array  # [..., H, T, V]
    seen: jax.Array  # [..., H, T, K]
    read: jax.Array  # [..., H, T, K]
    within: jax.Array  # [..., H, T, T]
    written: jax.Array  # [..., H, T, K] the keys, decayed to the tile's end
    decay: jax.Array  # [..., H] a of the whole tile


def prepare(tokens: Tokens) -> Tile:
    """The tiles [B, ...], each of T tokens, a power of two."""
    q, k, v = (x.swapaxes(1, 2) for x in (tokens.query, tokens.key, tokens.value))  # [B, H, T, ...]
    strength = tokens.strength.swapaxes(1, 2)[..., None]
    total = jnp.cumsum(tokens.decay, axis=1).swapaxes(1, 2)  # [B, H, T]
    later = total[..., :, None] - total[..., None, :]  # from token j to token i
    T = total.shape[-1]
    past = jnp.exp(jnp.where(jnp.tril(jnp.ones((T, T), bool))[None, None], later, -jnp.inf))
    overlap = strength * product("bhik,bhjk->bhij", k, k) * past
    solve = unit_lower_inverse(jnp.tril(overlap, -1))
    decayed = jnp.exp(total)[..., None]
    return Tile(
        own=product("bhij,bhjv->bhiv", solve, strength * v),
        seen=product("bhij,bhjk->bhik", solve, strength * decayed * k),
        read=decayed * q,
        within=product("bhik,bhjk->bhij", q, k) * past,
        written=jnp.exp(total[..., -1:] - total)[..., None] * k,
        decay=jnp.exp(total[..., -1]),
    )


def through(tile: Tile, memory: Float[Array, "H K V"]) -> tuple[Float[Array, "H K V"], Float[Array, "H T V"]]:
    """The memory after one tile, and what its tokens read."""
    corrections = tile.own - product("htk,hkv->htv", tile.seen, memory)
    out = product("htk,hkv->htv", tile.read, memory) + product("hij,hjv->hiv", tile.within, corrections)
    added = product("htk,htv->hkv", tile.written, corrections)
    return tile.decay[:, None, None] * memory + added, out


def step(
    tokens: Tokens, memory: Float[Array, "B H K V"]
) -> tuple[Float[Array, "B H K V"], Float[Array, "B 1 H V"]]:
    """The memories after one token of each row, and what it reads."""
    q, k, v = tokens.query[:, 0], tokens.key[:, 0], tokens.value[:, 0]
    memory = jnp.exp(tokens.decay[:, 0])[..., None, None] * memory
    missing = tokens.strength[:, 0, :, None] * (v - product("bhk,bhkv->bhv", k, memory))
    memory = memory + k[..., None] * missing[..., None, :]
    return memory, product("bhk,bhkv->bhv", q, memory)[:, None]  # pyright: ignore[reportReturnType]


def unit_lower_inverse(below: Float[Array, "*lead T T"]) -> Float[Array, "*lead T T"]:
    """The inverse of 1 + `below`, which is strictly lower triangular; T is a power of two.

    By halves, from blocks of one: what joins two inverted blocks is minus their product around the block
    below the diagonal. No power of the matrix appears, so keys that are all alike do no harm.
    """
    T = below.shape[-1]
    lead = below.shape[:-2]
    inverse = jnp.ones((*lead, T, 1, 1), below.dtype)  # blocks of the diagonal
    size = 1
    while size < T:
        blocks = below.reshape(*lead, T // (2 * size), 2 * size, T // (2 * size), 2 * size)
        diagonal = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)
        upper, lower = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        joint = product("...ij,...jk->...ik", diagonal[..., size:, :size], upper)
        joint = -product("...ij,...jk->...ik", lower, joint)
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        inverse = jnp.concatenate([top, jnp.concatenate([joint, lower], axis=-1)], axis=-2)
        size *= 2
    return inverse[..., 0, :, :]


def unit_length(x: Float[Array, "*lead K"], eps: float) -> Float[Array, "*lead K"]:
    """Rows of length 1; eps is added to the square of the length."""
    return x * jax.lax.rsqrt(row_sum(x * x)[..., None] + eps)


def window_sum(windows: Float[Array, "B W C"], taps: Float[Array, "C N"]) -> Any:
    """A causal convolution of each channel: windows have the N - 1 inputs before the T first."""
    N = taps.shape[1]
    T = windows.shape[1] - N + 1
    out = windows[:, :T] * taps[None, None, :, 0]
    for j in range(1, N):
        out = out + windows[:, j : j + T] * taps[None, None, :, j]
    return out
