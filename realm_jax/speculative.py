"""Speculative decoding: several tokens a step, which are those of plain decoding, sampled or greedy.

Every row samples as plain decoding would at its position, with the noise of that position; a guess stands
if it is the token sampled there (drafter-invariant coupling; Daliri, Musco and Suresh 2024). So neither the
drafter, nor how many guesses there are, nor what else is in the batch shows in the output. Rows are steps
of one token each, of whichever slots: no row's bits depend on how many there are.

R rows of a step, S slots.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from realm_jax.banks import Bank
from realm_jax.buckets import Pool
from realm_jax.decoding import Autoregressive, DecodeState, Guess, PromptTiles, StepOutput, StepRows
from realm_jax.drafters import Drafter
from realm_jax.weights import Params


@dataclass(frozen=True)
class Speculative:
    """A drafter's guesses, and the target's verdict on them in the same step."""

    target: Autoregressive
    drafter: Drafter

    def empty_state(self, pool: Pool) -> DecodeState:
        """The target's, and the drafter's."""
        return replace(self.target.empty_state(pool), draft=self.drafter.empty_state(pool))

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def prefill(
        self, params: Params, bank: Bank, state: DecodeState, tiles: PromptTiles
    ) -> tuple[DecodeState, StepOutput, Float[Array, "B T D"]]:
        """As the target's; the drafter has read the tiles, too."""
        state, output, hidden = self.target.prefill(params, bank, state, tiles)
        return replace(state, draft=self.drafter.prefill(params, state, tiles, hidden)), output, hidden

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def step(
        self, params: Params, bank: Bank, state: DecodeState, rows: StepRows
    ) -> tuple[DecodeState, StepOutput]:
        """Each slot with rows is longer by one token, and by its guesses up to the first wrong one."""
        S, slots, offsets = state.history.shape[0], jnp.asarray(rows.slots), jnp.asarray(rows.offsets)
        guesses, draft = self.drafter.propose(params, state, rows)
        is_guess = offsets > 0
        tokens = jnp.where(is_guess, jnp.roll(guesses.tokens, 1), state.tokens[slots])
        active = (slots < S) & (~is_guess | jnp.roll(guesses.known, 1))
        at = state.lengths[slots] + offsets
        after, chosen, logprobs, hidden = self.target.advance(
            params, bank, replace(state, draft=draft), slots, tokens, at, active
        )
        is_right = guesses.known & (chosen == guesses.tokens)
        is_real = active & self.stands(is_right, offsets)
        is_newest = is_real & ~jnp.roll(is_real & is_guess, -1)
        after = replace(
            after,
            lengths=after.lengths.at[slots].add(is_real.astype(jnp.int32), mode="drop"),
            tokens=after.tokens.at[jnp.where(is_newest, slots, S)].set(chosen, mode="drop"),
        )
        after = replace(after, draft=self.drafter.settle(state, after, rows, hidden))
        verdict = jnp.where(is_right, Guess.RIGHT, Guess.WRONG)
        said = jnp.where(guesses.known, verdict, Guess.NONE).astype(jnp.int32)
        return after, StepOutput(chosen, is_real, logprobs, said)

    def stands(self, is_right: Bool[Array, "R"], offsets: Int[Array, "R"]) -> Bool[Array, "R"]:
        """Whether the guesses of all rows before it of the same slot were right."""
        wrong = (~is_right).astype(jnp.int32)
        before = jnp.cumsum(wrong) - wrong
        start = jnp.arange(offsets.shape[0], dtype=jnp.int32) - offsets
        return before == before[start]
