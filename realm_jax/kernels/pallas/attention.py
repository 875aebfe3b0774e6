"""Attention in a kernel: which one, and with what block sizes, is settled when a program is traced.

B rows, T new tokens, S slots, C capacity, N query heads, K kv heads, H head dim, M stacked queries: the T
tokens in order, of each the heads that share a kv head, so that a tile of queries spans few positions.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from realm_jax.errors import RequestError
from realm_jax.kernels.pallas import attention_gpu, attention_tpu, tuning
from realm_jax.kernels.pallas.attention_softmax import Form, arithmetic

FEW_TOKENS = 16
"""Up to so many tokens of a row, as in decoding and verification, the cache is what takes the time."""

Blocks = attention_gpu.Blocks | attention_tpu.Blocks
_KERNELS: dict[str, Any] = {"gpu": attention_gpu, "tpu": attention_tpu}


def attention(
    q: Float[Array, "B T N H"],
    k: Array,  # [S, K, C, H]
    v: Array,  # [S, K, C, H]
    k_scale: Float[Array, "S K C"] | None,
    v_scale: Float[Array, "S K C"] | None,
    slots: Int[Array, "B"] | None,
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None = None,
    blocks: Blocks | None = None,
    target: tuning.Target | None = None,
) -> Float[Array, "B T N H"]:
    """As `kernels.attention`. blocks, target: of the tuning table and this process, unless given."""
    B, T, N, H = q.shape
    K, C = k.shape[1:3]
    target = target or tuning.target()
    kernel = _KERNELS[target.platform]
    blocks = blocks or _blocks(kernel, target, T, H, k.dtype)
    slots = jnp.arange(B, dtype=jnp.int32) if slots is None else slots
    # no division in the kernel: each stacked query has its position
    at = jnp.repeat(jnp.where(positions < C, positions, -1), N // K, axis=1)
    out = kernel.attention(
        _stack(q, K),
        k,
        v,
        None if k_scale is None or v_scale is None else (k_scale, v_scale),
        slots,
        at,
        None if sinks is None else jnp.tile(sinks.astype(jnp.float32).reshape(K, N // K), (1, T)),
        Form(scale, softcap, window),
        blocks,
        interpret=target.interpret,
    )
    return _unstack(out, T)


def bucket(tokens: int, head_dim: int, cached: jnp.dtype) -> str:
    """The shapes that share block sizes: phase / type of the products / padded head / type of the cache."""
    phase = "decode" if tokens <= FEW_TOKENS else "prefill"
    return f"{phase}/{arithmetic(cached)}/{pl.next_power_of_2(head_dim)}/{cached}"


def _blocks(kernel: Any, target: tuning.Target, tokens: int, head_dim: int, cached: jnp.dtype) -> Blocks:
    name = f"attention_{target.platform}"
    found = tuning.sizes(name, target.kind, bucket(tokens, head_dim, cached))
    try:
        return kernel.Blocks(**found)
    except TypeError as problem:
        raise RequestError(f"tuning table: {name} on {target.kind!r}: {problem}") from None


def _stack(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K M H"]:
    B, T, N, H = q.shape
    group = N // kv_heads
    grouped = q.reshape(B, T, kv_heads, group, H).transpose(0, 2, 1, 3, 4)
    return grouped.reshape(B, kv_heads, T * group, H)


def _unstack(out: Float[Array, "B K M H"], T: int) -> Float[Array, "B T N H"]:
    B, K, M, H = out.shape
    return out.reshape(B, K, T, M // T, H).transpose(0, 2, 1, 3, 4).reshape(B, T, -1, H)
