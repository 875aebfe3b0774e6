"""The compiled programs that advance sequences, behind the `Strategy` interface.

A strategy owns the device state of a pool of slots. The engine calls `prefill` and `step`, never knowing
how tokens come about. B rows, T tokens of a chunk, S slots, R rows of a step, K tokens of a step.
"""

import functools
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.config import Pool
from realm_jax.model import Caches, Transformer, hidden_states, next_token_logits
from realm_jax.sampling import SamplingRows, TokenCounts, TokenLogprobs, sample
from realm_jax.weights import Params


@struct.dataclass
class DecodeState:
    """All that a pool of slots carries from step to step. Every leaf leads with the slot axis."""

    caches: Caches
    lengths: jax.Array  # [S] tokens in the cache
    tokens: jax.Array  # [S] the newest token, not yet in the cache
    sampling: SamplingRows
    counts: TokenCounts


@struct.dataclass
class PrefillChunk:
    """A part of one prompt, padded to a bucket."""

    tokens: jax.Array  # [1, T]
    slot: jax.Array  # []
    start: jax.Array  # [] position of the first token
    length: jax.Array  # [] tokens that are real
    is_last: jax.Array  # [] whether the prompt ends here, and its first token is sampled
    sampling: SamplingRows  # one row


@struct.dataclass
class StepOutput:
    """What a call produced: row r's first `counts[r]` of K tokens are real."""

    tokens: jax.Array  # [R, K]
    counts: jax.Array  # [R]
    logprobs: TokenLogprobs  # of one token a row


@runtime_checkable
class Strategy(Protocol):
    """How tokens come about: one at a time, or drafted and verified."""

    def empty_state(self, pool: Pool) -> DecodeState: ...

    def prefill(
        self, params: Params, state: DecodeState, chunk: PrefillChunk
    ) -> tuple[DecodeState, StepOutput]: ...

    def step(self, params: Params, state: DecodeState, active: Array) -> tuple[DecodeState, StepOutput]: ...


@dataclass(frozen=True)
class Autoregressive:
    """One token a step."""

    model: Transformer
    kv_dtype: str

    def empty_state(self, pool: Pool) -> DecodeState:
        vocab = self.model.config.vocab_size
        return DecodeState(
            caches=self.model.empty_caches(pool.slots, pool.capacity, jnp.dtype(self.kv_dtype)),
            lengths=jnp.zeros(pool.slots, jnp.int32),
            tokens=jnp.zeros(pool.slots, jnp.int32),
            sampling=SamplingRows.greedy(pool.slots, vocab),
            counts=TokenCounts.zeros(pool.slots, vocab),
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def prefill(
        self, params: Params, state: DecodeState, chunk: PrefillChunk
    ) -> tuple[DecodeState, StepOutput]:
        """The chunk stands in its slot's cache; the slot's next token is sampled after the last chunk."""
        T = chunk.tokens.shape[1]
        at = jnp.arange(T, dtype=jnp.int32)
        hidden, caches = hidden_states(
            self.model, params, chunk.tokens, (chunk.start + at)[None], state.caches, chunk.slot
        )
        state = _begin_slot(state, chunk)
        last = jax.lax.dynamic_slice_in_dim(hidden[0], chunk.length - 1, 1)
        logits = next_token_logits(self.model, params, last)
        length = chunk.start + chunk.length
        counts = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, chunk.slot, 1), state.counts)
        token, logprobs = sample(logits, chunk.sampling, counts, length[None], chunk.is_last[None])
        state = replace(
            state,
            caches=caches,
            lengths=state.lengths.at[chunk.slot].set(length),
            tokens=state.tokens.at[chunk.slot].set(token[0]),
            counts=_count(state.counts, chunk.slot[None], token, chunk.is_last[None]),
        )
        return state, StepOutput(token[:, None], chunk.is_last[None].astype(jnp.int32), logprobs)

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
    def step(
        self, params: Params, state: DecodeState, active: Bool[Array, "R"]
    ) -> tuple[DecodeState, StepOutput]:
        """The first R slots, where active, are one token longer."""
        R = active.shape[0]
        rows = jax.tree.map(lambda x: x[:R], (state.lengths, state.tokens, state.sampling, state.counts))
        lengths, tokens, sampling, counts = rows
        capacity = state.caches[0].k.shape[2]
        positions = jnp.where(active, lengths, capacity)  # an idle row writes past the end: nothing
        hidden, caches = hidden_states(
            self.model, params, tokens[:, None], positions[:, None], state.caches, jnp.int32(0)
        )
        logits = next_token_logits(self.model, params, hidden[:, 0])
        chosen, logprobs = sample(logits, sampling, counts, lengths + 1, active)
        state = replace(
            state,
            caches=caches,
            lengths=state.lengths.at[:R].add(active.astype(jnp.int32)),
            tokens=state.tokens.at[:R].set(jnp.where(active, chosen, tokens)),
            counts=_count(state.counts, jnp.arange(R, dtype=jnp.int32), chosen, active),
        )
        return state, StepOutput(chosen[:, None], active.astype(jnp.int32), logprobs)


@functools.partial(jax.jit, donate_argnums=1)
def move(
    source: DecodeState, target: DecodeState, from_slot: Int[Array, ""], to_slot: Int[Array, ""]
) -> DecodeState:
    """The target with the sequence of a slot of a smaller pool copied into `to_slot`."""

    def copy(s: Array, t: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(s, from_slot, 1)
        return jax.lax.dynamic_update_slice(t, row, (to_slot, *(0 for _ in t.shape[1:])))

    return jax.tree.map(copy, source, target)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def forward(
    model: Transformer, params: Params, caches: Caches, tokens: Int[Array, "1 T"], start: Int[Array, ""]
) -> tuple[Float[Array, "T V"], Caches]:
    """Logits of every position of a chunk that begins at `start` of slot 0."""
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    hidden, caches = hidden_states(model, params, tokens, positions[None], caches, jnp.int32(0))
    return next_token_logits(model, params, hidden[0]), caches


def _begin_slot(state: DecodeState, chunk: PrefillChunk) -> DecodeState:
    """The slot's sampling parameters are the chunk's, and its prompt's tokens are counted."""
    vocab = state.counts.in_prompt.shape[1]
    real = jnp.arange(chunk.tokens.shape[1], dtype=jnp.int32) < chunk.length
    tokens = jnp.where(real, chunk.tokens[0], vocab)
    is_first = chunk.start == 0
    before = state.counts.in_prompt[chunk.slot] & ~is_first
    in_prompt = state.counts.in_prompt.at[chunk.slot].set(before.at[tokens].set(True, mode="drop"))
    generated = state.counts.generated.at[chunk.slot].set(0)
    sampling = jax.tree.map(lambda s, row: s.at[chunk.slot].set(row[0]), state.sampling, chunk.sampling)
    return replace(state, sampling=sampling, counts=TokenCounts(in_prompt, generated))


def _count(
    counts: TokenCounts, slots: Int[Array, "R"], tokens: Int[Array, "R"], active: Bool[Array, "R"]
) -> TokenCounts:
    generated = counts.generated.at[slots, tokens].add(active.astype(jnp.int32))
    return replace(counts, generated=generated)
