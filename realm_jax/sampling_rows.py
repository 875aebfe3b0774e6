"""What sampling knows of each row, as data: parameters, and the tokens seen.

R rows, C history capacity, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from realm_jax.params import MAX_LOGIT_BIAS, MAX_STOP_TOKENS, SamplingParams

STOP_SLOTS = MAX_STOP_TOKENS + 32
"""A request's own stop tokens and the model's end tokens, of which the tokenizer knows fewer than 32."""

HostOrDevice = Any
"""A jax.Array or a NumPy array: a program takes these as they are, cheaper than many small transfers."""


@struct.dataclass
class SamplingRows:
    """The sampling parameters of each row, as data: no value compiles a new program."""

    temperature: HostOrDevice  # [R] 0 = greedy
    top_p: HostOrDevice  # [R]
    top_k: HostOrDevice  # [R] 0 = off
    min_p: HostOrDevice  # [R]
    repetition_penalty: HostOrDevice  # [R]
    presence_penalty: HostOrDevice  # [R]
    frequency_penalty: HostOrDevice  # [R]
    seed: HostOrDevice  # [R, 2] uint32, high word first
    sample_index: HostOrDevice  # [R]
    bias_ids: HostOrDevice  # [R, MAX_LOGIT_BIAS] V = none
    bias: HostOrDevice  # [R, MAX_LOGIT_BIAS]
    stop_ids: HostOrDevice  # [R, STOP_SLOTS] V = none
    prompt_length: HostOrDevice  # [R]
    min_tokens: HostOrDevice  # [R] so many tokens stand before a stop token may
    num_logprobs: HostOrDevice  # [R] -1 = none wanted
    has_form: HostOrDevice  # [R] whether a mask says which tokens may come

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        *,
        seed: int,
        sample_index: int,
        stop_ids: tuple[int, ...],
        prompt: int,
        vocab: int,
    ) -> "SamplingRows":
        """One row, in host memory. stop_ids: all tokens that end this request; prompt: its length."""

        def real(value: float) -> np.ndarray:
            return np.array([value], np.float32)

        def integer(value: int) -> np.ndarray:
            return np.array([value], np.int32)

        bias = params.logit_bias
        return cls(
            temperature=real(params.temperature),
            top_p=real(params.top_p),
            top_k=integer(max(params.top_k, 0)),
            min_p=real(params.min_p),
            repetition_penalty=real(params.repetition_penalty),
            presence_penalty=real(params.presence_penalty),
            frequency_penalty=real(params.frequency_penalty),
            seed=np.array([[seed >> 32, seed & 0xFFFFFFFF]], np.uint32),
            sample_index=integer(sample_index),
            bias_ids=_padded(np.fromiter(bias.keys(), np.int32), MAX_LOGIT_BIAS, vocab),
            bias=_padded(np.fromiter(bias.values(), np.float32), MAX_LOGIT_BIAS, 0.0),
            stop_ids=_padded(np.array(stop_ids, np.int32), STOP_SLOTS, vocab),
            prompt_length=integer(prompt),
            min_tokens=integer(params.min_tokens),
            num_logprobs=integer(-1 if params.logprobs is None else params.logprobs),
            has_form=np.array([params.structured_output is not None]),
        )

    @classmethod
    def greedy(cls, rows: int, vocab: int) -> "SamplingRows":
        """Rows that pick the best token: what empty slots hold."""
        one = cls.of(
            SamplingParams(temperature=0.0), seed=0, sample_index=0, stop_ids=(), prompt=0, vocab=vocab
        )
        return jax.tree.map(lambda x: np.repeat(x, rows, axis=0), one)

    @classmethod
    def join(cls, rows: "Sequence[SamplingRows]") -> "SamplingRows":
        """These rows, one after the other, in host memory."""
        return jax.tree.map(lambda *x: np.concatenate(x), *rows)


@struct.dataclass
class TokenCounts:
    """Which tokens each row has seen, for the penalties."""

    in_prompt: jax.Array  # [R, V] bool
    generated: jax.Array  # [R, V] int32

    @classmethod
    def of(
        cls,
        history: Int[Array, "R C"],
        prompt_lengths: Int[Array, "R"],
        lengths: Int[Array, "R"],
        vocab: int,
    ) -> "TokenCounts":
        """Counted from the first `lengths` tokens of each row, of which so many are the prompt's."""
        at = jnp.arange(history.shape[1], dtype=jnp.int32)[None]
        is_prompt = at < prompt_lengths[:, None]
        is_generated = ~is_prompt & (at < lengths[:, None])
        each = jnp.arange(history.shape[0], dtype=jnp.int32)[:, None]
        empty = jnp.zeros((history.shape[0], vocab), jnp.int32)
        return cls(
            empty.at[each, jnp.where(is_prompt, history, vocab)].set(1, mode="drop") > 0,
            empty.at[each, jnp.where(is_generated, history, vocab)].add(1, mode="drop"),
        )


def _padded(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    return np.pad(values, (0, size - len(values)), constant_values=fill)[None]
