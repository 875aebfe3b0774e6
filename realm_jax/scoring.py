"""Logits and log-probabilities of given tokens. B tiles of T tokens, D hidden, V vocabulary."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.banks import NO_ADAPTERS, Bank
from realm_jax.config import TILE, Numerics
from realm_jax.kernels import row_sum, top_k
from realm_jax.lora.banked import AdapterRows
from realm_jax.model import Caches, Transformer, hidden_states, next_token_logits
from realm_jax.params import MAX_LOGPROBS
from realm_jax.weights import Params

CALLS = (1, 4, 8)
"""Tiles that one call of `logits` may have."""


@dataclass(frozen=True)
class Score:
    """Natural-log probabilities of tokens, None for one that has nothing before it.

    is_greedy: whether each scored token is the model's first choice.
    """

    token_ids: list[int]
    logprobs: list[float | None]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole."""
        return math.fsum(p for p in self.logprobs if p is not None)


@struct.dataclass
class TargetLogprobs:
    """Log-probabilities of the token after each token."""

    chosen: jax.Array  # [B, T]
    is_greedy: jax.Array  # [B, T] whether nothing scores higher
    top_ids: jax.Array  # [B, T, MAX_LOGPROBS]
    top: jax.Array  # [B, T, MAX_LOGPROBS] best first; zeros where not wanted


@functools.partial(jax.jit, static_argnums=0)
def score_tiles(
    model: Transformer,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    wants_top: Bool[Array, ""],
) -> TargetLogprobs:
    """Each target scored; tile by tile, so that no more than [T, V] logits stand at once."""

    def tile(each: tuple[Array, Array]) -> TargetLogprobs:
        hidden, targets = each
        logits = next_token_logits(model, params, hidden)
        best = logits.max(axis=-1)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        total = best + jnp.log(row_sum(jnp.exp(logits - best[:, None])))
        count = min(MAX_LOGPROBS, logits.shape[-1])
        shape = (targets.shape[0], count)
        top, ids = jax.lax.cond(
            wants_top,
            lambda: top_k(logits, count),
            lambda: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32)),
        )
        return TargetLogprobs(chosen - total, chosen >= best, ids, top - total[:, None])

    return jax.lax.map(tile, (hidden, targets))


def logits(
    model: Transformer,
    params: Params,
    token_ids: Sequence[int],
    numerics: Numerics,
    bank: Bank = NO_ADAPTERS,
    adapters: Sequence[tuple[int, float]] = (),
) -> Float[np.ndarray, "T V"]:
    """float32: row t scores the token that follows the first t + 1. Computed in the tiles of serving.

    adapters: slots of the bank, and what each is multiplied by.
    """
    width = max(len(adapters), bank.width)
    index, scale = np.zeros((1, width), np.int32), np.zeros((1, width), np.float32)
    for j, each in enumerate(adapters):
        index[0, j], scale[0, j] = each
    capacity = max(1 << (len(token_ids) - 1).bit_length(), CALLS[-1] * TILE)  # few capacities, few programs
    caches = model.empty_caches(1, capacity, numerics)
    found, start = [], 0
    while start < len(token_ids):
        left = -(-(len(token_ids) - start) // TILE)
        tiles = np.zeros(next((n for n in CALLS if n >= left), CALLS[-1]) * TILE, np.int32)
        part = token_ids[start : start + len(tiles)]
        tiles[: len(part)] = part
        shaped = tiles.reshape(-1, TILE)
        rows = AdapterRows(*(np.repeat(x, len(shaped), axis=0) for x in (index, scale)))
        scores, caches = _forward(model, params, bank, rows, caches, shaped, np.int32(start))
        found.append(np.asarray(scores).reshape(len(tiles), -1)[: len(part)])
        start += len(part)
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def _forward(
    model: Transformer,
    params: Params,
    bank: Bank,
    adapters: AdapterRows,
    caches: Caches,
    tiles: Int[Array, "B T"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "B T V"], Caches]:
    """Logits of tiles that follow one another, the first at position `start`."""
    params = bank.adapt(params, adapters)
    positions = start + jnp.arange(tiles.size, dtype=jnp.int32).reshape(tiles.shape)
    slots = jnp.zeros(tiles.shape[0], jnp.int32)
    hidden, caches = hidden_states(model, params, tiles, positions, caches, slots)
    return next_token_logits(model, params, hidden), caches
