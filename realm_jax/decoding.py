"""The compiled programs that advance sequences, behind the `Strategy` interface.

A strategy owns the device state of a pool of slots. The engine calls `prefill` and `step`, never knowing
how tokens come about. B tiles of T tokens, S slots, R rows of a step, K tokens of a step, C capacity.
"""

import functools
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.banks import Bank
from realm_jax.buckets import Pool
from realm_jax.config import MAX_LORAS_PER_REQUEST, TILE, Numerics
from realm_jax.lora.banked import AdapterRows
from realm_jax.model import Caches, Transformer, hidden_states, next_token_logits
from realm_jax.sampling import TokenLogprobs, sample
from realm_jax.sampling_rows import HostOrDevice, SamplingRows, TokenCounts
from realm_jax.weights import Params

COPIED = 4
"""A slot is copied so many tiles at a time: no second whole slot on the way, and not one call a tile."""


@struct.dataclass
class DecodeState:
    """All that a pool of slots carries from step to step. Every leaf leads with the slot axis."""

    caches: Caches
    history: jax.Array  # [S, C] the tokens that the caches hold
    lengths: jax.Array  # [S] how many these are
    tokens: jax.Array  # [S] the newest token, not yet in the cache
    adapters: AdapterRows
    sampling: SamplingRows


@struct.dataclass
class PromptTiles:
    """Tiles of prompts, whichever; those of one prompt stand in order. Unused ones have slot S."""

    tokens: HostOrDevice  # [B, T] padded
    slots: HostOrDevice  # [B]
    starts: HostOrDevice  # [B] position of the first token
    lengths: HostOrDevice  # [B] tokens that are real
    is_last: HostOrDevice  # [B] whether the prompt ends here, and its first token is sampled
    adapters: AdapterRows
    sampling: SamplingRows  # [B] of prompts that end here


@struct.dataclass
class StepOutput:
    """What a call produced: row r's first `counts[r]` of K tokens are real."""

    tokens: jax.Array  # [R, K]
    counts: jax.Array  # [R]
    logprobs: TokenLogprobs  # of one token a row


@runtime_checkable
class Strategy(Protocol):
    """How tokens come about: one at a time, or drafted and verified.

    bank: the adapters that rows may name.
    """

    def empty_state(self, pool: Pool) -> DecodeState: ...

    def prefill(
        self, params: Params, bank: Bank, state: DecodeState, tiles: PromptTiles
    ) -> tuple[DecodeState, StepOutput, Array]:
        """Also the hidden states [B, T, D], from which prompt tokens can be scored."""
        ...

    def step(
        self, params: Params, bank: Bank, state: DecodeState, active: Array
    ) -> tuple[DecodeState, StepOutput]: ...


@dataclass(frozen=True)
class Autoregressive:
    """One token a step."""

    model: Transformer
    numerics: Numerics

    def empty_state(self, pool: Pool) -> DecodeState:
        return DecodeState(
            caches=self.model.empty_caches(pool.slots, pool.capacity, self.numerics),
            history=jnp.zeros((pool.slots, pool.capacity), jnp.int32),
            lengths=jnp.zeros(pool.slots, jnp.int32),
            tokens=jnp.zeros(pool.slots, jnp.int32),
            adapters=AdapterRows(
                jnp.zeros((pool.slots, MAX_LORAS_PER_REQUEST), jnp.int32),
                jnp.zeros((pool.slots, MAX_LORAS_PER_REQUEST), jnp.float32),
            ),
            sampling=jax.tree.map(jnp.asarray, SamplingRows.greedy(pool.slots, self.model.config.vocab_size)),
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def prefill(
        self, params: Params, bank: Bank, state: DecodeState, tiles: PromptTiles
    ) -> tuple[DecodeState, StepOutput, Float[Array, "B T D"]]:
        """The tiles stand in their slots' caches; a prompt that ends has its first token."""
        params = bank.adapt(params, tiles.adapters)
        slots, is_last = tiles.slots, tiles.is_last
        S, capacity = state.history.shape
        at = tiles.starts[:, None] + jnp.arange(tiles.tokens.shape[1], dtype=jnp.int32)[None]
        positions = jnp.where((slots < S)[:, None], at, capacity)
        hidden, caches = hidden_states(self.model, params, tiles.tokens, positions, state.caches, slots)
        history = state.history.at[slots[:, None], positions].set(tiles.tokens, mode="drop")
        ends = tiles.starts + tiles.lengths
        token, logprobs = self._sample_last(params, hidden, history, tiles, ends)
        done = jnp.where(is_last, slots, S)  # S: dropped below
        adapters, sampling = jax.tree.map(
            lambda all, new: all.at[done].set(new, mode="drop"),
            (state.adapters, state.sampling),
            (tiles.adapters, tiles.sampling),
        )
        state = DecodeState(
            caches=caches,
            history=history,
            lengths=state.lengths.at[done].set(ends, mode="drop"),
            tokens=state.tokens.at[done].set(token, mode="drop"),
            adapters=adapters,
            sampling=sampling,
        )
        return state, StepOutput(token[:, None], is_last.astype(jnp.int32), logprobs), hidden

    def _sample_last(
        self, params: Params, hidden: Array, history: Array, tiles: PromptTiles, ends: Int[Array, "B"]
    ) -> tuple[Int[Array, "B"], TokenLogprobs]:
        """The token after each tile, where any prompt ends."""
        B, V = ends.shape[0], self.model.config.vocab_size

        def draw() -> tuple[Array, TokenLogprobs]:
            last = jnp.take_along_axis(hidden, jnp.maximum(tiles.lengths - 1, 0)[:, None, None], axis=1)
            logits = next_token_logits(self.model, params, last[:, 0])

            def count() -> TokenCounts:
                return TokenCounts.of(history[tiles.slots], ends, ends, V)

            return sample(logits, tiles.sampling, count, ends, tiles.is_last)

        return jax.lax.cond(
            jnp.any(tiles.is_last), draw, lambda: (jnp.zeros(B, jnp.int32), TokenLogprobs.zeros(B, V))
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def step(
        self, params: Params, bank: Bank, state: DecodeState, active: Bool[Array, "R"]
    ) -> tuple[DecodeState, StepOutput]:
        """The first R slots, where active, are one token longer."""
        R, V = active.shape[0], self.model.config.vocab_size
        lengths, tokens, adapters, sampling = jax.tree.map(
            lambda x: x[:R], (state.lengths, state.tokens, state.adapters, state.sampling)
        )
        params = bank.adapt(params, adapters)
        capacity = state.history.shape[1]
        positions = jnp.where(active, lengths, capacity)  # an idle row writes past the end: nothing
        hidden, caches = hidden_states(
            self.model, params, tokens[:, None], positions[:, None], state.caches, None
        )
        each = jnp.arange(R, dtype=jnp.int32)
        history = state.history.at[each, positions].set(tokens, mode="drop")
        logits = next_token_logits(self.model, params, hidden[:, 0])

        def count() -> TokenCounts:
            return TokenCounts.of(history[:R], sampling.prompt_length, lengths + 1, V)

        chosen, logprobs = sample(logits, sampling, count, lengths + 1, active)
        state = replace(
            state,
            caches=caches,
            history=history,
            lengths=state.lengths.at[:R].add(active.astype(jnp.int32)),
            tokens=state.tokens.at[:R].set(jnp.where(active, chosen, tokens)),
        )
        return state, StepOutput(chosen[:, None], active.astype(jnp.int32), logprobs)


@functools.partial(jax.jit, donate_argnums=0)
def copy_within(
    state: DecodeState, from_slot: Int[Array, ""], to_slot: Int[Array, ""], tiles: Int[Array, ""]
) -> DecodeState:
    """The state with what a slot's first tiles hold also in `to_slot`."""
    return _copied(None, state, from_slot, to_slot, tiles)


@functools.partial(jax.jit, donate_argnums=1)
def copy_up(
    source: DecodeState,
    target: DecodeState,
    from_slot: Int[Array, ""],
    to_slot: Int[Array, ""],
    tiles: Int[Array, ""],
) -> DecodeState:
    """The target with what the first tiles of a smaller pool's slot hold in `to_slot`."""
    return _copied(source, target, from_slot, to_slot, tiles)


def _copied(
    source: DecodeState | None, target: DecodeState, from_slot: Array, to_slot: Array, tiles: Array
) -> DecodeState:
    """source: None where it is the target, of which no second version may be kept alive."""
    held = target if source is None else source
    most = held.history.shape[1] // TILE
    step = min(COPIED, most)

    def copy_some(i: Array, caches: Caches) -> Caches:
        at = jnp.minimum(i * step, most - step)

        def copy(s: Array, t: Array) -> Array:
            width = s.shape[2] // most  # of a tile: its positions, or blocks of them
            rest = (0,) * (s.ndim - 3)
            some = (1, s.shape[1], step * width, *s.shape[3:])
            values = jax.lax.dynamic_slice(s, (from_slot, 0, at * width, *rest), some)
            return jax.lax.dynamic_update_slice(t, values, (to_slot, 0, at * width, *rest))

        return jax.tree.map(copy, caches if source is None else source.caches, caches)

    def copy_row(s: Array, t: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(s, from_slot, 1)
        return jax.lax.dynamic_update_slice(t, row, (to_slot, *(0 for _ in t.shape[1:])))

    caches = jax.lax.fori_loop(jnp.int32(0), -(-tiles // step), copy_some, target.caches)
    rest = jax.tree.map(copy_row, replace(held, caches=()), replace(target, caches=()))
    return replace(rest, caches=caches)
