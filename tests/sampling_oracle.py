"""What `sample` has to give, in NumPy and float64, where sorting is allowed; noise from jax.random."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.params import SamplingParams
from realm_jax.sampling import TokenLogprobs, sample
from realm_jax.sampling_rows import SamplingRows, TokenCounts


@jax.jit
def compiled(
    logits: jax.Array, rows: SamplingRows, counts: TokenCounts, positions: jax.Array, active: jax.Array
) -> tuple[jax.Array, TokenLogprobs]:
    """`sample`, given what it would count."""
    masks = jnp.zeros((logits.shape[0], -(-logits.shape[1] // 32)), jnp.uint32)  # of no row
    return sample(logits, rows, lambda: counts, positions, active, lambda: masks)


def unseen(rows: int, vocab: int) -> TokenCounts:
    """Counts of rows that have seen nothing."""
    return TokenCounts(jnp.zeros((rows, vocab), jnp.bool_), jnp.zeros((rows, vocab), jnp.int32))


PROMPT = 10  # tokens before the first one sampled
ROWS = 240  # of every call of `draw`, so that few programs are compiled

made: dict[str, SamplingRows] = {}


def rows_of(
    params: Sequence[SamplingParams], vocab: int, *, seeds: Sequence[int] | None = None, **more: Any
) -> SamplingRows:
    """One row for each; seeds: by default a row's place."""
    more = {"sample_index": 0, "prompt": PROMPT, **more}
    for p in params:
        if (key := f"{p} {vocab} {more}") not in made:
            options = {"stop_ids": p.stop_token_ids, **more}
            made[key] = SamplingRows.of(p, seed=0, vocab=vocab, **options)
    each = [made[f"{p} {vocab} {more}"] for p in params]
    rows = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves)), *each)
    words = [[seed >> 32, seed & 0xFFFFFFFF] for seed in (seeds or range(len(params)))]
    return dataclasses.replace(rows, seed=jnp.array(words, jnp.uint32))


def draw(
    logits: np.ndarray, rows: SamplingRows, positions: np.ndarray, counts: TokenCounts | None = None
) -> tuple[np.ndarray, TokenLogprobs]:
    """What `sample` gives for rows that are all active, with inactive ones behind them."""
    R, V = logits.shape
    counts = unseen(R, V) if counts is None else counts
    x, at, active = np.float32(logits), np.int32(positions), np.ones(R, np.bool_)

    def padded(leaf: Any) -> jax.Array:
        wide = np.zeros((ROWS, *leaf.shape[1:]), leaf.dtype)
        wide[:R] = leaf
        return jnp.asarray(wide)

    tokens, logprobs = compiled(*jax.tree.map(padded, (x, rows, counts, at, active)))
    return np.asarray(tokens)[:R], logprobs


def truncated(x: np.ndarray, p: SamplingParams, whole_ties: bool = False) -> np.ndarray:
    """Which tokens min_p, top_k and top_p leave of scaled logits, in the documented order.

    Of equal tokens the first ids come first; whole_ties: they stay or go together.
    """
    order = np.argsort(-x, kind="stable")
    x = x[order]

    def with_ties(kept: np.ndarray) -> np.ndarray:
        return x >= x[kept].min() if whole_ties else kept

    kept = np.exp(x - x[0]) >= p.min_p * (1 - 1e-6)
    kept &= with_ties(np.arange(len(x)) < (p.top_k if p.top_k > 0 else len(x)))
    mass = np.where(kept, np.exp(x - x[0]), 0.0)
    before = np.cumsum(mass) - mass
    kept &= with_ties((before < p.top_p * mass.sum()) | (p.top_p >= 1))
    found = np.zeros(len(x), bool)
    found[order] = kept
    return found


@functools.partial(jax.jit, static_argnums=3)
def random_bits(seeds: jax.Array, sample_index: int, positions: jax.Array, vocab: int) -> jax.Array:
    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), sample_index)
        return jax.random.bits(jax.random.fold_in(key, position), (vocab,), jnp.uint32)

    return jax.vmap(row)(seeds, positions)


def gumbel(seeds: Sequence[int], positions: np.ndarray, vocab: int, sample_index: int = 0) -> np.ndarray:
    """Noise of every token of every row [R, V], from jax.random's own bits."""
    words = jnp.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], jnp.uint32)
    bits = np.asarray(random_bits(words, sample_index, jnp.asarray(positions, jnp.int32), vocab))
    return -np.log(-np.log(((bits >> 9) + 0.5) * 2.0**-23))


def expected(logits: np.ndarray, p: SamplingParams, noise: np.ndarray) -> int | None:
    """The token that has to come; None where float32 may not tell the best two apart."""
    if p.temperature == 0:
        return int(np.argmax(logits))
    x = logits.astype(np.float64) / np.float64(np.float32(p.temperature))
    scores = np.where(truncated(x, p), x + noise, -np.inf)
    second, best = np.partition(scores, -2)[-2:]
    nearby = [dataclasses.replace(p, top_p=min(1.0, max(1e-9, p.top_p * (1 + d)))) for d in (1e-5, -1e-5)]
    is_clear = p.top_p == 1 or (truncated(x, nearby[0]) == truncated(x, nearby[1])).all()
    return int(np.argmax(scores)) if is_clear and best - second > 1e-4 else None
