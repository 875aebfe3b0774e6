"""Runs plans on the device: owns its state, and announces and times what is compiled."""

import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.buckets import Buckets, copy_name, decode_name, prefill_name, score_name
from realm_jax.config import TILE
from realm_jax.decoding import DecodeState, PromptTiles, StepOutput, Strategy, copy_up, copy_within
from realm_jax.errors import CapacityError
from realm_jax.model import Transformer
from realm_jax.sampling_rows import SamplingRows
from realm_jax.scoring import TargetLogprobs, score_tiles
from realm_jax.serving.packing import PromptTargets, pack_prompts
from realm_jax.serving.request import Sequence
from realm_jax.serving.scheduler import Copy, Decode, Prefill
from realm_jax.weights import Params

Result = TypeVar("Result")


class Runner:
    """The device's side of an engine: one state a pool, made when first used."""

    def __init__(
        self,
        strategy: Strategy,
        model: Transformer,
        params: Params,
        buckets: Buckets,
        on_compile: Callable[[str], None] | None,
    ) -> None:
        self.programs: dict[str, float] = {}  # name -> seconds of its first call, compilation included
        self._strategy, self._model, self._params = strategy, model, params
        self._buckets, self._on_compile = buckets, on_compile
        self._vocab = model.config.vocab_size
        self._states: dict[int, DecodeState] = {}

    def forget(self) -> None:
        """All state is dropped: the next calls run as on a new device."""
        self._states.clear()

    def prefill(
        self, plan: Prefill, row_of: Callable[[Sequence], SamplingRows], scored: PromptTargets | None
    ) -> tuple[StepOutput, TargetLogprobs | None]:
        """The plan's tiles are computed, and their targets scored, if any are wanted."""
        tiles = pack_prompts(plan, self._buckets.pools[plan.pool], row_of, self._vocab)
        output, hidden = self._prefill(plan.pool, tiles)
        if scored is None:
            return output, None
        return output, self._score(hidden, scored.targets, scored.wants_top)

    def decode(self, plan: Decode) -> StepOutput:
        """The plan's sequences are one step further."""
        return self._step(plan.pool, np.array([sequence is not None for sequence in plan.sequences]))

    def copy(self, plan: Copy) -> None:
        """What the plan's slot holds also stands in its target."""
        slots = np.int32(plan.from_slot), np.int32(plan.to_slot)
        source, target = self._state(plan.from_pool), self._state(plan.to_pool)
        pools = self._buckets.pools
        name = copy_name(pools[plan.from_pool], pools[plan.to_pool])

        def run() -> DecodeState:
            return copy_within(target, *slots) if source is target else copy_up(source, target, *slots)

        self._states[plan.to_pool] = self._call(name, run)

    def warmup(self) -> None:
        """Every program has run once; what the slots held is lost."""
        for i, pool in enumerate(self._buckets.pools):
            for tiles in pool.tiles:
                nothing = pack_prompts(Prefill(i, tiles, ()), pool, lambda _: _never(), self._vocab)
                _, hidden = self._prefill(i, nothing)
                self._score(hidden, np.zeros((tiles, TILE), np.int32), False)
            for rows in pool.rows:
                self._step(i, np.zeros(rows, np.bool_))
            for source in range(max(i - 1, 0), i + 1):
                self.copy(Copy(source, 0, i, 0))
        jax.block_until_ready(self._states)

    def _prefill(self, pool: int, tiles: PromptTiles) -> tuple[StepOutput, jax.Array]:
        name = prefill_name(tiles.tokens.shape[0], self._buckets.pools[pool])
        state = self._state(pool)
        self._states[pool], output, hidden = self._call(
            name, lambda: self._strategy.prefill(self._params, state, tiles)
        )
        return output, hidden

    def _score(self, hidden: jax.Array, targets: np.ndarray, wants_top: bool) -> TargetLogprobs:
        return self._call(
            score_name(targets.shape[0]),
            lambda: score_tiles(self._model, self._params, hidden, targets, np.bool_(wants_top)),
        )

    def _step(self, pool: int, active: np.ndarray) -> StepOutput:
        name = decode_name(len(active), self._buckets.pools[pool])
        state = self._state(pool)
        self._states[pool], output = self._call(
            name, lambda: self._strategy.step(self._params, state, jnp.asarray(active))
        )
        return output

    def _call(self, name: str, program: Callable[[], Result]) -> Result:
        """The program's result; its first call, which compiles it, is announced and timed."""
        if name in self.programs:
            return program()
        if self._on_compile is not None:
            self._on_compile(name)
        start = time.perf_counter()
        result = program()
        self.programs[name] = time.perf_counter() - start
        return result

    def _state(self, pool: int) -> DecodeState:
        if pool not in self._states:
            shape = self._buckets.pools[pool]
            try:
                self._states[pool] = jax.block_until_ready(self._strategy.empty_state(shape))
            except jax.errors.JaxRuntimeError as error:
                raise CapacityError(
                    f"no memory for the caches of {shape.slots} sequences of {shape.capacity:,} tokens "
                    f"(lower --ctx-size or max_num_seqs): {str(error).splitlines()[0]}"
                ) from error
        return self._states[pool]


def _never() -> SamplingRows:
    raise AssertionError("an empty plan has no sequence")
