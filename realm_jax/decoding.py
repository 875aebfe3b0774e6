"""The compiled programs that advance sequences, behind the `Strategy` interface.

A strategy owns the device state of a pool of slots. The engine calls `prefill` and `step`, never knowing
how tokens come about. B tiles of T tokens, S slots, R rows of a step, C capacity.
"""

import functools
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.banks import Bank
from realm_jax.buckets import Pool
from realm_jax.config import MAX_LORAS_PER_REQUEST, Numerics
from realm_jax.lora.banked import AdapterRows
from realm_jax.model import Caches, Transformer, hidden_states, next_token_logits
from realm_jax.processors import UNCHANGED, EachRow, Unchanged, Written
from realm_jax.sampling import TokenLogprobs, sample
from realm_jax.sampling_rows import HostOrDevice, SamplingRows, TokenCounts
from realm_jax.weights import Params


@struct.dataclass
class DraftState:
    """What a drafter carries from step to step."""

    caches: Any = ()  # leaves [S, K, C, ...], as `Caches`
    rows: Any = ()  # leaves [S, ...]


@struct.dataclass
class DecodeState:
    """All that a pool of slots carries from step to step. Every leaf leads with the slot axis."""

    caches: Caches
    history: jax.Array  # [S, C] the tokens that the caches hold
    lengths: jax.Array  # [S] how many these are
    tokens: jax.Array  # [S] the newest token, not yet in the cache
    adapters: AdapterRows
    sampling: SamplingRows
    masks: jax.Array  # [S, W] uint32: a bit for each token that may be the next, where the answer has a form
    draft: DraftState


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
    masks: HostOrDevice  # [B, W] uint32 which tokens may be their first


@struct.dataclass
class StepRows:
    """The rows of a step: a slot's newest token, and then, if any, so many of what is guessed to follow it.

    Those of one slot stand in order.
    """

    slots: HostOrDevice  # [R]; S where a row is idle
    offsets: HostOrDevice  # [R] 0 = the newest token, j = the j-th guess


@struct.dataclass
class StepOutput:
    """What a call produced, by row."""

    tokens: jax.Array  # [R]
    is_real: jax.Array  # [R] whether the token is its sequence's next one after those of the rows before
    logprobs: TokenLogprobs
    guesses: jax.Array | None = None  # [R] `Guess`, of real tokens; None where nothing guesses


class Guess(IntEnum):
    """What a drafter had said of a token."""

    NONE = 0
    WRONG = 1
    RIGHT = 2


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
        self, params: Params, bank: Bank, state: DecodeState, rows: StepRows
    ) -> tuple[DecodeState, StepOutput]: ...


@dataclass(frozen=True)
class Autoregressive:
    """One token a step: row r is slot r, or idle.

    processor: what a user makes of the logits.
    """

    model: Transformer
    numerics: Numerics
    processor: EachRow | Unchanged = UNCHANGED

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
            masks=jnp.zeros((pool.slots, mask_words(self.model.config.vocab_size)), jnp.uint32),
            draft=DraftState(),
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def prefill(
        self, params: Params, bank: Bank, state: DecodeState, tiles: PromptTiles
    ) -> tuple[DecodeState, StepOutput, Float[Array, "B T D"]]:
        """The tiles stand in their slots' caches; a prompt that ends has its first token."""
        params = bank.adapt(params, tiles.adapters)
        slots, is_last = tiles.slots, tiles.is_last
        S, capacity = state.history.shape
        positions = tile_positions(tiles, S, capacity)
        hidden, caches = hidden_states(
            self.model, params, tiles.tokens, positions, state.caches, slots, tiles.lengths
        )
        history = state.history.at[slots[:, None], positions].set(tiles.tokens, mode="drop")
        ends = tiles.starts + tiles.lengths
        token, logprobs = self._sample_last(params, hidden, history, tiles, ends)
        done = jnp.where(is_last, slots, S)  # S: dropped below
        adapters, sampling = jax.tree.map(
            lambda all, new: all.at[done].set(new, mode="drop"),
            (state.adapters, state.sampling),
            (tiles.adapters, tiles.sampling),
        )
        state = replace(
            state,
            caches=caches,
            history=history,
            lengths=state.lengths.at[done].set(ends, mode="drop"),
            tokens=state.tokens.at[done].set(token, mode="drop"),
            adapters=adapters,
            sampling=sampling,
        )
        return state, StepOutput(token, jnp.asarray(is_last), logprobs), hidden

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

            def process(logits: Array) -> Array:
                return self.processor(logits, lambda: Written(history[tiles.slots], ends, ends))

            return sample(
                logits, tiles.sampling, count, ends, tiles.is_last, lambda: jnp.asarray(tiles.masks), process
            )

        return jax.lax.cond(
            jnp.any(tiles.is_last), draw, lambda: (jnp.zeros(B, jnp.int32), TokenLogprobs.zeros(B, V))
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def step(
        self, params: Params, bank: Bank, state: DecodeState, rows: StepRows
    ) -> tuple[DecodeState, StepOutput]:
        """The first R slots, where active, are one token longer."""
        active = jnp.asarray(rows.slots) < state.history.shape[0]
        R = active.shape[0]
        tokens = state.tokens[:R]
        state, chosen, logprobs, _ = self.advance(
            params, bank, state, None, tokens, state.lengths[:R], active
        )
        state = replace(
            state,
            lengths=state.lengths.at[:R].add(active.astype(jnp.int32)),
            tokens=state.tokens.at[:R].set(jnp.where(active, chosen, tokens)),
        )
        return state, StepOutput(chosen, active, logprobs)

    def advance(
        self,
        params: Params,
        bank: Bank,
        state: DecodeState,
        slots: Int[Array, "R"] | None,
        tokens: Int[Array, "R"],
        at: Int[Array, "R"],
        active: Bool[Array, "R"],
    ) -> tuple[DecodeState, Int[Array, "R"], TokenLogprobs, Float[Array, "R D"]]:
        """The tokens stand in their slots at these positions; also what each row samples after its own.

        slots: None where row r is slot r. The state's lengths and newest tokens are as they were.
        """
        R, V = active.shape[0], self.model.config.vocab_size
        capacity = state.history.shape[1]

        def of_rows(x: Array) -> Array:
            return x[:R] if slots is None else x[slots]  # of an idle row, whatever the last slot has

        adapters, sampling = jax.tree.map(of_rows, (state.adapters, state.sampling))
        params = bank.adapt(params, adapters)
        positions = jnp.where(active, at, capacity)  # an idle row writes past the end: nothing
        hidden, caches = hidden_states(
            self.model, params, tokens[:, None], positions[:, None], state.caches, slots
        )
        each = jnp.arange(R, dtype=jnp.int32) if slots is None else slots
        history = state.history.at[each, positions].set(tokens, mode="drop")
        logits = next_token_logits(self.model, params, hidden[:, 0])

        def count() -> TokenCounts:
            return TokenCounts.of(of_rows(history), sampling.prompt_length, at + 1, V)

        def process(logits: Array) -> Array:
            return self.processor(logits, lambda: Written(of_rows(history), at + 1, sampling.prompt_length))

        chosen, logprobs = sample(
            logits, sampling, count, at + 1, active, lambda: of_rows(state.masks), process
        )
        return replace(state, caches=caches, history=history), chosen, logprobs, hidden[:, 0]


def mask_words(vocab: int) -> int:
    """How many words of 32 bits have a bit for each token."""
    return -(-vocab // 32)


def tile_positions(tiles: PromptTiles, slots: int, capacity: int) -> Int[Array, "B T"]:
    """Where each token of the tiles stands; past the end for unused tiles."""
    at = tiles.starts[:, None] + jnp.arange(tiles.tokens.shape[1], dtype=jnp.int32)[None]
    return jnp.where((tiles.slots < slots)[:, None], at, capacity)
