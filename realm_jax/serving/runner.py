"""Runs plans on the device: owns its state, and announces and times what is compiled."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from realm_jax.banks import NO_ADAPTERS, Bank
from realm_jax.buckets import Buckets, Pool, copy_name, decode_name, prefill_name, score_name
from realm_jax.config import TILE
from realm_jax.decoding import (
    DecodeState,
    PromptTiles,
    StepOutput,
    StepRows,
    Strategy,
)
from realm_jax.errors import CapacityError
from realm_jax.model import Transformer
from realm_jax.programs import Program, Programs
from realm_jax.sampling_rows import SamplingRows
from realm_jax.scoring import TargetLogprobs, score_tiles
from realm_jax.serving.packing import PromptTargets, pack_masks, pack_prompts, pack_rows
from realm_jax.serving.plans import Copy, Decode, Prefill
from realm_jax.serving.request import Sequence
from realm_jax.slot_copies import copy_up, copy_within
from realm_jax.weights import Params


class Runner:
    """The device's side of an engine: one state a pool, made when first used."""

    def __init__(
        self,
        strategy: Strategy,
        model: Transformer,
        params: Params,
        buckets: Buckets,
        programs: Programs,
        on_compile: Callable[[str], None] | None,
    ) -> None:
        self.programs: dict[str, float] = {}  # name -> seconds of its first call, compilation included
        self._source, self._ready = programs, dict[str, Program]()
        self._strategy, self._model, self._params = strategy, model, params
        self._buckets, self._on_compile = buckets, on_compile
        self._vocab = model.config.vocab_size
        self._states: dict[int, DecodeState] = {}
        self.bank = NO_ADAPTERS

    def forget(self) -> None:
        """All state is dropped: the next calls run as on a new device."""
        self._states.clear()

    def prefill(
        self, plan: Prefill, row_of: Callable[[Sequence], SamplingRows], scored: PromptTargets | None
    ) -> tuple[StepOutput, TargetLogprobs | None, jax.Array]:
        """The plan's tiles are computed, and their targets scored, if any are wanted.

        The last array has the hidden states [B, T, D].
        """
        tiles = pack_prompts(plan, self._buckets.pools[plan.pool], row_of, self._vocab)
        width = self._width(tile.sequence for tile in plan.tiles)
        output, hidden = self._prefill(plan.pool, tiles, width)
        if scored is None:
            return output, None, hidden
        return output, self._score(hidden, scored.targets, scored.wants_top), hidden

    def decode(self, plan: Decode) -> StepOutput:
        """The plan's sequences are one step further."""
        pool = self._buckets.pools[plan.pool]
        if (masks := pack_masks(plan, pool, self._vocab)) is not None:
            state = self._state(plan.pool)
            placed = jax.device_put(masks, state.masks.sharding)
            self._states[plan.pool] = dataclasses.replace(state, masks=placed)
        rows = pack_rows(plan, pool)
        return self._step(plan.pool, rows, self._width(s for s in plan.sequences if s is not None))

    def copy(self, plan: Copy) -> None:
        """What the first tiles of the plan's slot hold also stands in its target."""
        what = np.int32(plan.from_slot), np.int32(plan.to_slot), np.int32(plan.tiles)
        source, target = self._state(plan.from_pool), self._state(plan.to_pool)
        pools = self._buckets.pools
        name = copy_name(pools[plan.from_pool], pools[plan.to_pool])
        states, copy = ((target,), copy_within) if source is target else ((source, target), copy_up)
        self._states[plan.to_pool] = self._call(name, copy, *states, *what)

    def warmup(self) -> None:
        """Every program has run once; what the slots held is lost."""
        for i in range(len(self._buckets.pools)):
            for width in self._buckets.widths if self.bank.places else (0,):
                self._warm_up(i, width)
            for source in range(max(i - 1, 0), i + 1):
                self.copy(Copy(source, 0, i, 0, tiles=1))
        jax.block_until_ready(self._states)

    def _warm_up(self, i: int, width: int) -> None:
        """Prefill and steps of a pool, for rows of so many adapters."""
        pool = self._buckets.pools[i]
        for tiles in pool.tiles:
            nothing = pack_prompts(Prefill(i, tiles, ()), pool, lambda _: _never(), self._vocab)
            _, hidden = self._prefill(i, nothing, width)
            self._score(hidden, np.zeros((tiles, TILE), np.int32), False)
        for rows in pool.rows:
            self._step(i, pack_rows(Decode(i, rows, ()), pool), width)

    def bank_for(self, adapters: int) -> Bank:
        """The bank for rows with so many adapters."""
        return self._bank(self._buckets.width_for(adapters, self.bank.rank))

    def _width(self, sequences: Iterable[Sequence]) -> int:
        most = max((len(s.request.adapters) for s in sequences), default=0)
        return self._buckets.width_for(most, self.bank.rank)

    def _bank(self, width: int) -> Bank:
        return self.bank.replace(width=width) if width else NO_ADAPTERS  # pyright: ignore[reportAttributeAccessIssue]

    def _prefill(self, pool: int, tiles: PromptTiles, width: int) -> tuple[StepOutput, jax.Array]:
        name = prefill_name(tiles.tokens.shape[0], self._buckets.pools[pool], width, self.bank.rank)
        state = self._state(pool)
        done = self._call(name, self._strategy.prefill, self._params, self._bank(width), state, tiles)
        self._states[pool], output, hidden = done
        return output, hidden

    def _score(self, hidden: jax.Array, targets: np.ndarray, wants_top: bool) -> TargetLogprobs:
        score = functools.partial(score_tiles, self._model)
        name = score_name(targets.shape[0])
        return self._call(name, score, self._params, hidden, targets, np.bool_(wants_top))

    def _step(self, pool: int, rows: StepRows, width: int) -> StepOutput:
        name = decode_name(len(rows.slots), self._buckets.pools[pool], width, self.bank.rank)
        state, bank = self._state(pool), self._bank(width)
        self._states[pool], output = self._call(name, self._strategy.step, self._params, bank, state, rows)
        return output

    def _call(self, name: str, function: Any, *arguments: Any) -> Any:
        """The jitted function's result; its first call, which may compile it, is timed."""
        if name in self.programs:
            return self._ready[name].run(*arguments)
        start = time.perf_counter()
        self._ready[name] = self._source.get(function, *arguments, on_compile=lambda: self._announce(name))
        result = self._ready[name].run(*arguments)
        self.programs[name] = time.perf_counter() - start
        return result

    def _announce(self, name: str) -> None:
        if self._on_compile is not None:
            self._on_compile(name)

    def _state(self, pool: int) -> DecodeState:
        if pool not in self._states:
            shape = self._buckets.pools[pool]
            try:
                empty = functools.partial(_empty_state, self._strategy, shape)
                program = self._source.get(empty, on_compile=lambda: None)
                self._states[pool] = jax.block_until_ready(program.run())
            except jax.errors.JaxRuntimeError as error:
                raise CapacityError(
                    f"no memory for the caches of {shape.slots} sequences of {shape.capacity:,} tokens "
                    f"(lower --ctx-size or max_num_seqs): {str(error).splitlines()[0]}"
                ) from error
        return self._states[pool]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _empty_state(strategy: Strategy, pool: Pool) -> DecodeState:
    return strategy.empty_state(pool)


def _never() -> SamplingRows:
    raise AssertionError("an empty plan has no sequence")
