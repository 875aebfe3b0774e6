"""What guesses the tokens to come. A wrong guess costs time; it never changes what is said.

R rows of a step, S slots, C capacity, D rows that draft, V vocabulary of the target.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.buckets import Pool
from realm_jax.config import Numerics
from realm_jax.decoding import DecodeState, DraftState, PromptTiles, StepRows, mask_words, tile_positions
from realm_jax.model import Caches, Transformer, hidden_states, next_token_logits
from realm_jax.sampling import sample
from realm_jax.sampling_rows import SamplingRows, TokenCounts
from realm_jax.weights import Params

LONGEST, SHORTEST = 8, 1
"""Tokens that must have stood before alike for what followed them to be a guess; the longest match wins."""

CATCH_UP = 8
"""So many tokens at once a draft model reads that it has not: one after a step whose guesses were all right,
many after steps without a guess."""


@struct.dataclass
class Guesses:
    """What is guessed to follow each row's token; of a slot's rows, a known one has known ones before it."""

    tokens: jax.Array  # [R]
    known: jax.Array  # [R] whether there is a guess


@runtime_checkable
class Drafter(Protocol):
    """A source of guesses. Its state is in `DecodeState.draft`, its params, if any, in `params["draft"]`.

    is_free: whether guesses cost next to nothing. Then it makes one for every row, verified or not.
    """

    is_free: ClassVar[bool]

    def empty_state(self, pool: Pool) -> DraftState: ...

    def prefill(
        self, params: Params, state: DecodeState, tiles: PromptTiles, hidden: Float[Array, "B T D"]
    ) -> DraftState:
        """The drafter has read the tiles. state, hidden: what the target made of them."""
        ...

    def propose(self, params: Params, state: DecodeState, rows: StepRows) -> tuple[Guesses, DraftState]:
        """What may follow; rows of a slot that has none but its newest token need none."""
        ...

    def settle(
        self,
        before: DecodeState,
        state: DecodeState,
        rows: StepRows,
        hidden: Float[Array, "R D"],
    ) -> DraftState:
        """The drafter knows what became of its guesses. state: after the step, but for the draft's own."""
        ...


@dataclass(frozen=True)
class NGram:
    """Guesses what followed when the last tokens stood before, in the prompt or since (Saxena 2023)."""

    is_free: ClassVar = True

    def empty_state(self, pool: Pool) -> DraftState:
        """It carries nothing: the history is all it needs."""
        return DraftState()

    def prefill(self, params: Params, state: DecodeState, tiles: PromptTiles, hidden: Array) -> DraftState:
        """As `Drafter.prefill`."""
        return state.draft

    def propose(self, params: Params, state: DecodeState, rows: StepRows) -> tuple[Guesses, DraftState]:
        """As `Drafter.propose`."""
        slots = jnp.asarray(rows.slots)
        tokens, known = continuation(
            state.history[slots], state.lengths[slots], state.tokens[slots], jnp.asarray(rows.offsets)
        )
        return Guesses(tokens, known & (slots < state.history.shape[0])), state.draft

    def settle(self, before: DecodeState, state: DecodeState, rows: StepRows, hidden: Array) -> DraftState:
        """As `Drafter.settle`."""
        return state.draft


def continuation(
    history: Int[Array, "R C"], lengths: Int[Array, "R"], newest: Int[Array, "R"], offsets: Int[Array, "R"]
) -> tuple[Int[Array, "R"], Bool[Array, "R"]]:
    """The token that followed, `offsets` further on, where the last ones stood before; and whether they did.

    Of places that match as far, the latest counts. What would stand past the newest token is what has
    been guessed there: the text goes on in a circle.
    """
    R, C = history.shape
    each, at = jnp.arange(R, dtype=jnp.int32), jnp.arange(C, dtype=jnp.int32)[None]
    text = history.at[each, lengths].set(newest, mode="drop")
    back = lengths[:, None] - jnp.arange(LONGEST, dtype=jnp.int32)[None]
    last = jnp.take_along_axis(text, jnp.maximum(back, 0), axis=1)
    padded = jnp.pad(text, ((0, 0), (LONGEST, 0)), constant_values=-1)  # no token: nothing stands there
    run, matched = jnp.ones((R, C), jnp.bool_), jnp.zeros((R, C), jnp.int32)
    for j in range(LONGEST):
        run = run & (padded[:, LONGEST - j : LONGEST - j + C] == last[:, j : j + 1])
        matched = matched + run.astype(jnp.int32)
    score = jnp.where(at < lengths[:, None], matched * C + at, 0).max(axis=1)
    place, period = score % C, lengths - score % C
    found = place + 1 + offsets % jnp.maximum(period, 1)
    return jnp.take_along_axis(text, found[:, None], axis=1)[:, 0], score // C >= SHORTEST


@dataclass(frozen=True)
class DraftModel:
    """A smaller model of the same vocabulary, which samples with the target's own noise.

    vocab: of the target; what only one of both models has, the draft never says.
    """

    is_free: ClassVar = False

    model: Transformer
    numerics: Numerics
    vocab: int

    def empty_state(self, pool: Pool) -> DraftState:
        """Its own caches, and how many tokens they hold."""
        caches = self.model.empty_caches(pool.slots, pool.capacity, self.numerics)
        return DraftState(caches, jnp.zeros(pool.slots, jnp.int32))

    def prefill(self, params: Params, state: DecodeState, tiles: PromptTiles, hidden: Array) -> DraftState:
        """As `Drafter.prefill`."""
        S, capacity = state.history.shape
        positions = tile_positions(tiles, S, capacity)
        slots = jnp.asarray(tiles.slots)
        _, caches = self._read(params, tiles.tokens, positions, state.draft.caches, slots)
        done = jnp.where(tiles.is_last, slots, S)  # S: dropped below
        return DraftState(caches, state.draft.rows.at[done].set(tiles.starts + tiles.lengths, mode="drop"))

    def propose(self, params: Params, state: DecodeState, rows: StepRows) -> tuple[Guesses, DraftState]:
        """As `Drafter.propose`, for as many tokens as the row with most guesses has."""
        offsets = jnp.asarray(rows.offsets)
        R, S = offsets.shape[0], state.history.shape[0]
        if R == 1:  # no row for a guess
            return Guesses(jnp.zeros(R, jnp.int32), jnp.zeros(R, jnp.bool_)), state.draft
        is_start = (offsets == 0) & (jnp.roll(offsets, -1) == 1)
        drafts = is_start | (offsets > 0)
        of_draft = jnp.maximum(jnp.cumsum(is_start.astype(jnp.int32)) - 1, 0)
        starts = jnp.nonzero(is_start, size=max(R // 2, 1), fill_value=R)[0].astype(jnp.int32)
        slots = jnp.where(starts < R, jnp.asarray(rows.slots)[jnp.minimum(starts, R - 1)], S)
        most = offsets.max()
        guessed, caches, lengths = self._draft(params, state, slots, most, R)
        draft = DraftState(caches, lengths)
        return Guesses(guessed[of_draft, jnp.minimum(offsets, R - 1)], drafts & (offsets < most)), draft

    def settle(self, before: DecodeState, state: DecodeState, rows: StepRows, hidden: Array) -> DraftState:
        """Of the tokens it has read, those that turned out to be others are forgotten."""
        return state.draft.replace(rows=jnp.minimum(state.draft.rows, state.lengths))  # pyright: ignore[reportAttributeAccessIssue]

    def _draft(
        self, params: Params, state: DecodeState, slots: Int[Array, "D"], most: Int[Array, ""], R: int
    ) -> tuple[Int[Array, "D R"], Caches, Int[Array, "S"]]:
        """The first `most` guesses of each slot; the caches, and how many tokens these hold by now."""
        D, (S, C) = slots.shape[0], state.history.shape
        sampling = jax.tree.map(lambda x: x[slots], state.sampling)
        lengths, each = state.lengths[slots], jnp.arange(D, dtype=jnp.int32)
        text = state.history[slots].at[each, lengths].set(state.tokens[slots], mode="drop")
        unread = jnp.where((slots < S) & (most > 0), lengths - state.draft.rows[slots], 0)
        caches = self._catch_up(params, state.draft.caches, text, lengths, unread, slots)

        def guess(j: Array, carried: tuple[Any, ...]) -> tuple[Any, ...]:
            token, text, guessed, caches = carried
            at = jnp.where(slots < S, lengths + j, C)
            hidden, caches = self._read(params, token[:, None], at[:, None], caches, slots)
            token = self._sample(params, hidden[:, 0], text, at + 1, sampling, slots < S)
            return token, text.at[each, at + 1].set(token, mode="drop"), guessed.at[:, j].set(token), caches

        # a loop, because a branch would copy the caches: nothing runs where nobody drafts
        carried = state.tokens[slots], text, jnp.zeros((D, R), jnp.int32), caches
        _, _, guessed, caches = jax.lax.fori_loop(jnp.int32(0), most, guess, carried)
        known = jnp.where(most > 0, lengths + most, state.draft.rows[slots])
        return guessed, caches, state.draft.rows.at[slots].set(known, mode="drop")

    def _catch_up(
        self,
        params: Params,
        caches: Caches,
        text: Int[Array, "D C"],
        lengths: Int[Array, "D"],
        unread: Int[Array, "D"],
        slots: Int[Array, "D"],
    ) -> Caches:
        """The caches hold all tokens before each slot's newest, of which so many were unread."""
        C = text.shape[1]

        def read(carried: tuple[Array, Caches]) -> tuple[Array, Caches]:
            unread, caches = carried
            at = (lengths - unread)[:, None] + jnp.arange(CATCH_UP, dtype=jnp.int32)[None]
            tile = jnp.take_along_axis(text, jnp.minimum(at, C - 1), axis=1)
            positions = jnp.where(at < lengths[:, None], at, C)
            _, caches = self._read(params, tile, positions, caches, slots)
            return jnp.maximum(unread - CATCH_UP, 0), caches

        return jax.lax.while_loop(lambda carried: jnp.any(carried[0] > 0), read, (unread, caches))[1]

    def _read(
        self, params: Params, tokens: Array, positions: Array, caches: Caches, slots: Array
    ) -> tuple[Float[Array, "D T hidden"], Caches]:
        """Tokens that the draft does not know are read as its last one: the guess is bad, and only that."""
        known = jnp.minimum(tokens, self.model.config.vocab_size - 1)
        return hidden_states(self.model, params["draft"], known, positions, caches, slots)

    def _sample(
        self,
        params: Params,
        hidden: Float[Array, "D hidden"],
        text: Int[Array, "D C"],
        positions: Int[Array, "D"],
        rows: SamplingRows,
        active: Bool[Array, "D"],
    ) -> Int[Array, "D"]:
        """What plain decoding with the draft would sample at these positions."""
        logits = next_token_logits(self.model, params["draft"], hidden)[:, : self.vocab]
        missing = ((0, 0), (0, self.vocab - logits.shape[1]))
        logits = jnp.pad(logits, missing, constant_values=-jnp.inf)

        def count() -> TokenCounts:
            return TokenCounts.of(text, rows.prompt_length, positions, self.vocab)

        plain = rows.replace(  # pyright: ignore[reportAttributeAccessIssue]
            num_logprobs=jnp.full_like(rows.num_logprobs, -1),
            has_form=jnp.zeros_like(rows.has_form),  # for an answer with a form nothing is guessed
        )

        def no_masks() -> Array:
            return jnp.zeros((logits.shape[0], mask_words(self.vocab)), jnp.uint32)

        return sample(logits, plain, count, positions, active, no_masks)[0]
