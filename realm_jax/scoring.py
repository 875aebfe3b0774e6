"""Logits and log-probabilities of given tokens: prompts, continuations and perplexity.

Tokens are fed in chunks whose boundaries depend on the text alone, so a context shared by several
continuations is computed once and gives each the bits it would have had alone.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from realm_jax.config import BLOCK, Buckets
from realm_jax.decoding import forward
from realm_jax.errors import RequestError
from realm_jax.kernels import row_sum
from realm_jax.model import Caches, Transformer, hidden_states, next_token_logits
from realm_jax.weights import Params


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


class Scorer:
    """Scores token lists of up to `context` tokens with one model."""

    def __init__(
        self, model: Transformer, params: Params, buckets: Buckets, *, context: int, kv_dtype: str
    ) -> None:
        self._model, self._params, self._buckets = model, params, buckets
        self._context, self._dtype = context, jnp.dtype(kv_dtype)

    def score(self, ids: Sequence[int]) -> Score:
        """Every token of a text, given those before it."""
        return self.score_continuations(ids[:1], [ids[1:]], with_context=True)[0]

    def score_continuations(
        self, context: Sequence[int], continuations: Sequence[Sequence[int]], *, with_context: bool = False
    ) -> list[Score]:
        """The tokens of each continuation of one context, whose whole chunks are computed once.

        with_context: report the context's tokens too, without a probability.
        Raises RequestError if the context is empty, or a text is longer than the model's context or holds
        an id that is no token.
        """
        for continuation in continuations:
            self._check((*context, *continuation), bool(context))
        shared = (len(context) - 1) // BLOCK * BLOCK
        caches = self._empty_caches(len(context) + max(map(len, continuations)))
        for start in range(0, shared, BLOCK):
            _, _, caches = self._run(caches, context[start : start + BLOCK], [0] * BLOCK, start)
        scores = []
        for i, continuation in enumerate(continuations):
            is_last = i == len(continuations) - 1
            mine = caches if is_last else jax.tree.map(jnp.copy, caches)
            logprobs, best = self._continue(mine, [*context, *continuation], shared)
            count = len(continuation)
            known = logprobs[len(logprobs) - count :].tolist()
            is_greedy = bool(best[len(best) - count :].all())
            if with_context:
                scores.append(Score([*context, *continuation], [None] * len(context) + known, is_greedy))
            else:
                scores.append(Score(list(continuation), known, is_greedy))
        return scores

    def perplexities(self, ids: Sequence[int], *, window: int, bos: int | None = None) -> Iterator[float]:
        """The running perplexity after each window, as llama-perplexity defines it.

        The text is cut into windows; in each, the second half is scored, given all before it in the
        window. bos replaces a window's first token. Raises RequestError if the text fills no window.
        """
        if len(ids) < window:
            raise RequestError(f"text is {len(ids):,} tokens; one window is {window:,} (lower --ctx-size)")
        total, count = 0.0, 0
        for start in range(0, len(ids) - window + 1, window):
            part = list(ids[start : start + window])
            if bos is not None:
                part[0] = bos
            logprobs = self.score(part).logprobs[window // 2 + 1 :]
            total -= math.fsum(p for p in logprobs if p is not None)
            count += len(logprobs)
            yield math.exp(total / count)

    def logits(self, ids: Sequence[int]) -> Float[np.ndarray, "T V"]:
        """float32: row t scores the token that follows the first t + 1."""
        self._check(ids, bool(ids))
        caches, rows = self._empty_caches(len(ids)), []
        for start in range(0, len(ids), BLOCK):
            part = ids[start : start + BLOCK]
            tokens = self._padded(part)[None]
            scores, caches = forward(self._model, self._params, caches, tokens, jnp.int32(start))
            rows.append(np.asarray(scores)[: len(part)])
        return np.concatenate(rows)

    def _empty_caches(self, tokens: int) -> Caches:
        capacity = next(pool.capacity for pool in self._buckets.pools if pool.capacity >= tokens)
        return self._model.empty_caches(1, capacity, self._dtype)

    def _padded(self, ids: Sequence[int]) -> Array:
        bucket = self._buckets.chunk_for(len(ids))
        return jnp.asarray(np.pad(np.asarray(ids, np.int32), (0, bucket - len(ids))))

    def _continue(self, caches: Caches, ids: list[int], start: int) -> tuple[np.ndarray, np.ndarray]:
        """log p(ids[t + 1]) and whether it is the best choice, for each t from `start` on."""
        calls = []
        for at in range(start, len(ids) - 1, BLOCK):
            tokens = ids[at : min(at + BLOCK, len(ids) - 1)]
            logprobs, best, caches = self._run(caches, tokens, ids[at + 1 : at + 1 + len(tokens)], at)
            calls.append((len(tokens), logprobs, best))
        if not calls:
            return np.zeros(0, np.float32), np.zeros(0, np.bool_)
        return (
            np.concatenate([np.asarray(logprobs)[:n] for n, logprobs, _ in calls]),
            np.concatenate([np.asarray(best)[:n] for n, _, best in calls]),
        )

    def _run(
        self, caches: Caches, tokens: Sequence[int], targets: Sequence[int], start: int
    ) -> tuple[Array, Array, Caches]:
        return _score_chunk(
            self._model,
            self._params,
            caches,
            self._padded(tokens)[None],
            self._padded(targets),
            jnp.int32(start),
        )

    def _check(self, ids: Sequence[int], has_context: bool) -> None:
        if not has_context:
            raise RequestError("there is no context to score from; give at least one token before")
        if len(ids) > self._context:
            raise RequestError(
                f"text is {len(ids):,} tokens; the context is {self._context:,} (raise --ctx-size)"
            )
        vocab = self._model.config.vocab_size
        if (wrong := next((i for i in ids if not 0 <= i < vocab), None)) is not None:
            raise RequestError(f"text has token id {wrong}; the vocabulary has {vocab:,}")


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _score_chunk(
    model: Transformer,
    params: Params,
    caches: Caches,
    tokens: Int[Array, "1 T"],
    targets: Int[Array, "T"],
    start: Int[Array, ""],
) -> tuple[Float[Array, "T"], Bool[Array, "T"], Caches]:
    """Log-probability of each target after its token, and whether nothing scores higher."""
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden, caches = hidden_states(model, params, tokens, positions[None], caches, jnp.int32(0))
    logits = next_token_logits(model, params, hidden[0])
    best = logits.max(axis=-1)
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    log_total = best + jnp.log(row_sum(jnp.exp(logits - best[:, None])))
    return chosen - log_total, chosen >= best, caches
