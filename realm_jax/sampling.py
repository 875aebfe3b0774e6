"""Batched sampling on the device: each row by its own parameters, no sort of the vocabulary.

Randomness is Gumbel noise, a pure function of (seed, sample, position, token): the token drawn is the
arg-max of scaled logits plus noise (Gumbel-max; Maddison et al. 2014). A drafter that adds the same noise
agrees with the target as often as their distributions do (Daliri, Musco and Suresh 2024).

R rows, V vocabulary, A candidates.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from realm_jax.kernels import first_argmax, row_sum, threefry, threshold, top_k
from realm_jax.params import MAX_LOGPROBS
from realm_jax.sampling_rows import SamplingRows, TokenCounts

CANDIDATES = 256
"""Truncated sampling looks at so many best tokens, and at all only where a row needs more."""

GROUP = 4
"""So many of the rows that need the whole vocabulary are drawn together."""


@struct.dataclass
class TokenLogprobs:
    """Log-probabilities of the model itself: before masks, temperature, truncation, penalties and bias."""

    chosen: jax.Array  # [R]
    top_ids: jax.Array  # [R, MAX_LOGPROBS]
    top: jax.Array  # [R, MAX_LOGPROBS] best first

    @classmethod
    def zeros(cls, rows: int, vocab: int) -> "TokenLogprobs":
        """What a step gives where no row asked."""
        shape = (rows, min(MAX_LOGPROBS, vocab))
        return cls(jnp.zeros(rows, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))


def sample(
    logits: Float[Array, "R V"],
    rows: SamplingRows,
    count: Callable[[], TokenCounts],
    positions: Int[Array, "R"],
    active: Bool[Array, "R"],
    masks: Callable[[], UInt32[Array, "R W"]],
    process: Callable[[Array], Array] = lambda logits: logits,
) -> tuple[Int[Array, "R"], TokenLogprobs]:
    """The token of each row, and its log-probability where any row asked for one.

    positions: where the tokens will stand. count: the tokens that each row has seen, asked for only if a
    row is adjusted. masks: a bit for each token that may come, asked for only if a row's answer has a form.
    process: what a user makes of the logits before all else.
    Stages that no active row uses are skipped; what an inactive row gets is garbage.
    """
    is_early = positions < rows.prompt_length + rows.min_tokens
    own = process(logits)
    possible = jax.lax.cond(
        jnp.any(active & rows.has_form),
        lambda: jnp.where(rows.has_form[:, None] & ~_bits(masks(), own.shape[1]), -jnp.inf, own),
        lambda: own,
    )
    adjusted = jax.lax.cond(
        jnp.any(active & (is_early | _is_adjusted(rows))),
        lambda: _adjust(possible, rows, count(), is_early),
        lambda: possible,
    )
    best = first_argmax(adjusted)
    draws = active & (rows.temperature > 0)
    tokens = jax.lax.cond(
        jnp.any(draws),
        lambda: jnp.where(draws, _draw(adjusted, rows, positions, draws), best),
        lambda: best,
    )
    wants_logprobs = jnp.any(active & (rows.num_logprobs >= 0))
    return tokens, jax.lax.cond(
        wants_logprobs, lambda: _logprobs(logits, tokens), lambda: TokenLogprobs.zeros(*logits.shape)
    )


def _bits(words: UInt32[Array, "R W"], count: int) -> Bool[Array, "R V"]:
    """The first bits of each row, the lowest of a word first."""
    shifts = jnp.arange(32, dtype=jnp.uint32)
    bits = (words[:, :, None] >> shifts[None, None]) & jnp.uint32(1)
    return bits.reshape(words.shape[0], -1)[:, :count] > 0


def _is_adjusted(rows: SamplingRows) -> Bool[Array, "R"]:
    return (
        (rows.repetition_penalty != 1)
        | (rows.presence_penalty != 0)
        | (rows.frequency_penalty != 0)
        | jnp.any(rows.bias != 0, axis=-1)
    )


def _adjust(
    logits: Float[Array, "R V"], rows: SamplingRows, counts: TokenCounts, is_early: Bool[Array, "R"]
) -> Float[Array, "R V"]:
    """Logits after bias, penalties (OpenAI's, and CTRL's repetition penalty) and early stops masked."""
    R, V = logits.shape
    each = jnp.arange(R, dtype=jnp.int32)[:, None]
    x = logits.at[each, rows.bias_ids].add(rows.bias, mode="drop")
    seen = counts.in_prompt | (counts.generated > 0)
    repetition = rows.repetition_penalty[:, None]
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    x = x - counts.generated.astype(jnp.float32) * rows.frequency_penalty[:, None]
    x = x - jnp.where(counts.generated > 0, rows.presence_penalty[:, None], 0.0)
    masked = jnp.where(is_early[:, None], rows.stop_ids, V)
    return x.at[each, masked].set(-jnp.inf, mode="drop")


def _draw(
    logits: Float[Array, "R V"], rows: SamplingRows, positions: Int[Array, "R"], draws: Bool[Array, "R"]
) -> Int[Array, "R"]:
    """A token of each row's truncated distribution, from the best candidates where they hold all of it."""
    below = logits - logits.max(axis=-1, keepdims=True)  # at most 0: no temperature overflows
    scaled = below / jnp.where(draws, rows.temperature, 1.0)[:, None]
    keys = _keys(rows, positions)
    tokens, fits = _draw_from_candidates(scaled, rows, keys)
    return _redraw(tokens, draws & ~fits, scaled, rows, keys)


def _draw_from_candidates(
    scaled: Float[Array, "R V"], rows: SamplingRows, keys: UInt32[Array, "R 2"]
) -> tuple[Int[Array, "R"], Bool[Array, "R"]]:
    """A token of each row, and whether the candidates hold all that truncation leaves."""
    values, ids = top_k(scaled, min(CANDIDATES, scaled.shape[-1]))
    count = values.shape[-1]
    limited = rows.top_k > 0
    nucleus = rows.top_p < 1
    floor = jnp.log(rows.min_p)
    kept = values >= floor[:, None]
    kept &= (jnp.arange(count, dtype=jnp.int32)[None] < rows.top_k[:, None]) | ~limited[:, None]
    mass = jnp.where(kept, jnp.exp(values), 0.0)
    held = row_sum(mass)
    is_all = (limited & (rows.top_k <= count)) | (values[:, -1] < floor) | (count == scaled.shape[-1])
    wanted = rows.top_p * jnp.where(is_all, held, row_sum(_mass(scaled, rows)))
    before = jnp.cumsum(mass, axis=-1) - mass
    kept = (before < wanted[:, None]) | ~nucleus[:, None]
    scores = jnp.where(kept, mass, 0.0) / _arrivals(keys, ids.astype(jnp.uint32))
    chosen = jnp.take_along_axis(ids, jnp.argmax(scores, axis=-1)[:, None], axis=-1)[:, 0]
    return chosen, is_all | (~limited & nucleus & (held >= wanted))


def _redraw(
    tokens: Int[Array, "R"],
    unfit: Bool[Array, "R"],
    scaled: Float[Array, "R V"],
    rows: SamplingRows,
    keys: UInt32[Array, "R 2"],
) -> Int[Array, "R"]:
    """The tokens, those of unfit rows drawn from the whole vocabulary.

    In groups, the unfit rows first, because most often there are few. The last group may come round to
    rows done before: what is drawn for a row depends on the row alone.
    """
    R = tokens.shape[0]
    size = min(GROUP, R)
    order = jnp.argsort(~unfit, stable=True)

    def draw(group: Int[Array, ""], tokens: Array) -> Array:
        at = order[(group * size + jnp.arange(size, dtype=jnp.int32)) % R]
        some = jax.tree.map(lambda x: x[at], rows)
        drawn = _draw_from_all(scaled[at], some, keys[at])
        return tokens.at[at].set(jnp.where(unfit[at], drawn, tokens[at]))

    groups = (unfit.sum(dtype=jnp.int32) + (size - 1)) // size
    return jax.lax.fori_loop(0, groups, draw, tokens)


def _draw_from_all(
    scaled: Float[Array, "R V"], rows: SamplingRows, keys: UInt32[Array, "R 2"]
) -> Int[Array, "R"]:
    """As `_draw_from_candidates`, over the whole vocabulary; of equal tokens at a limit all are kept.

    Instead of finding where top_p ends, tokens are taken by descending score until one has less than
    top_p of the mass above it: of the tokens inside, that one has the best score. Whatever is no
    likelier than a token outside is outside too, so that few are taken even where top_p is small.
    """
    mass = _mass(scaled, rows)
    limit = jnp.where(rows.top_k < scaled.shape[-1], rows.top_k, 0).astype(jnp.float32)
    mass = jnp.where(scaled >= threshold(scaled, jnp.sign(mass), limit)[:, None], mass, 0.0)
    wanted = jnp.where(rows.top_p < 1, rows.top_p * row_sum(mass), jnp.inf)
    ids = jnp.broadcast_to(jnp.arange(scaled.shape[-1], dtype=jnp.uint32)[None], scaled.shape)

    def take(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        scores, _, value, is_outside = state
        scores = jnp.where(is_outside[:, None] & (scaled <= value), 0.0, scores)
        token = first_argmax(scores)
        value = jnp.take_along_axis(scaled, token[:, None], axis=-1)
        above = row_sum(jnp.where(scaled > value, mass, 0.0))
        return scores, token, value, (above > 0) & (above >= wanted)  # False in a row of NaN: no mass at all

    R = scaled.shape[0]
    first = jnp.zeros(R, jnp.int32), jnp.full((R, 1), -jnp.inf), jnp.ones(R, jnp.bool_)  # drops nothing
    scores = mass / _arrivals(keys, ids)
    return jax.lax.while_loop(lambda state: jnp.any(state[3]), take, (scores, *first))[1]


def _mass(scaled: Float[Array, "R V"], rows: SamplingRows) -> Float[Array, "R V"]:
    """Probabilities, as multiples of the best one's, of what min_p leaves."""
    return jnp.where(scaled >= jnp.log(rows.min_p)[:, None], jnp.exp(scaled), 0.0)


def _keys(rows: SamplingRows, positions: Int[Array, "R"]) -> UInt32[Array, "R 2"]:
    """fold_in(fold_in(key(seed), sample index), position), as raw words."""
    keys = jnp.asarray(rows.seed)
    for number in (rows.sample_index, positions):
        keys = jnp.concatenate(threefry(keys, number.astype(jnp.uint32)[:, None]), axis=-1)
    return keys


def _arrivals(keys: UInt32[Array, "R 2"], ids: UInt32[Array, "R A"]) -> Float[Array, "R A"]:
    """Standard exponential noise of each token id: the same number whichever ids are asked for together.

    The token of the largest mass / arrival is that of the largest log mass - log arrival, which is
    log-probability plus Gumbel noise; this form needs one logarithm less.
    """

    first, second = threefry(keys, ids)
    # 23 bits and a half: never 0 or 1, exact in float32
    uniform = (((first ^ second) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(uniform)


def _logprobs(logits: Float[Array, "R V"], tokens: Int[Array, "R"]) -> TokenLogprobs:
    best = logits.max(axis=-1)
    log_total = best + jnp.log(row_sum(jnp.exp(logits - best[:, None])))
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - log_total
    top, ids = top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    return TokenLogprobs(chosen, ids, top - log_total[:, None])
