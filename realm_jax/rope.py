"""Rotary position embedding (Su et al. 2021): frequencies once on the host, rotation inside the step."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from realm_jax.config import RopeConfig


def frequencies(rope: RopeConfig, factors: np.ndarray | None = None) -> np.ndarray:
    """Angle per position of each rotated pair, float32 [dims / 2].

    factors: optional divisors, one a pair (llama 3's `rope_freqs`, phi 3's long and short factors).
    """
    pairs = np.arange(rope.dims // 2, dtype=np.float64)
    plain = rope.base ** (-2.0 * pairs / rope.dims)
    if factors is not None:
        plain = plain / np.asarray(factors, np.float64)
    if rope.scaling == "none":
        return plain.astype(np.float32)
    stretched = plain / rope.factor
    if rope.scaling == "linear":
        return stretched.astype(np.float32)
    keep = _yarn_ramp(rope)
    return (stretched * (1.0 - keep) + plain * keep).astype(np.float32)


def _yarn_ramp(rope: RopeConfig) -> np.ndarray:
    """Share of each pair that keeps its plain frequency (YaRN, Peng et al. 2023): fast pairs do."""

    def pair_turning(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return rope.dims * math.log(ratio) / (2 * math.log(rope.base))

    fast, slow = rope.betas
    low = max(0, math.floor(pair_turning(fast)))
    high = min(rope.dims - 1, math.ceil(pair_turning(slow)))
    ramp = (np.arange(rope.dims // 2) - low) / max(0.001, high - low)
    return 1.0 - np.clip(ramp, 0.0, 1.0)


def angles(
    positions: Int[Array, "B T"], frequency: Float[Array, "P"], magnitude: float
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """cos and sin of each position's angles, times `magnitude`."""
    angle = positions.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude


def rotate(
    x: Float[Array, "B T N H"],
    cos: Float[Array, "B T P"],
    sin: Float[Array, "B T P"],
    *,
    interleaved: bool,
) -> Float[Array, "B T N H"]:
    """`x` with its first 2P dimensions rotated, pair by pair.

    A pair is (2i, 2i + 1) when interleaved, else (i, i + P).
    """
    cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1)
