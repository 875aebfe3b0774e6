"""Buckets keep the laws that bound what is compiled, what is padded, and what the caches hold."""

import dataclasses

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realm_jax.buckets import Buckets, Pool
from realm_jax.config import BLOCK, MIN_ROWS, TILE, EngineConfig

MOST_PROGRAMS = 24

contexts = st.one_of(st.integers(1, 1 << 20), st.integers(1, 1100), st.integers(8000, 8500))
configs = st.builds(
    EngineConfig,
    max_num_seqs=st.one_of(st.integers(1, 512), st.integers(1, 20)),
    max_num_batched_tokens=st.one_of(st.integers(1, 1 << 20), st.integers(1, 600)),
    deterministic=st.booleans(),
)


@given(contexts, configs)
@example(1, EngineConfig(max_num_seqs=1, max_num_batched_tokens=1))
@example(1 << 20, EngineConfig(max_num_seqs=512, max_num_batched_tokens=1 << 20))
@example(1 << 20, EngineConfig(max_num_seqs=512, deterministic=True))
@example(4096, EngineConfig())
@example(256, EngineConfig(max_num_seqs=4))
@example(257, EngineConfig(max_num_seqs=17))
def test_every_plan_keeps_the_laws(context: int, config: EngineConfig):
    buckets = Buckets.plan(context, config)
    capacities = [pool.capacity for pool in buckets.pools]
    assert all(capacity % BLOCK == 0 for capacity in capacities)
    assert capacities == sorted(set(capacities))
    assert context <= capacities[-1] < context + BLOCK
    slots = [pool.slots for pool in buckets.pools]
    assert slots == sorted(slots, reverse=True)
    assert slots[0] == max(config.max_num_seqs, MIN_ROWS)
    assert buckets.max_num_seqs == config.max_num_seqs
    for pool in buckets.pools:
        check(pool, config)
    assert buckets.tiles == tuple(sorted({tiles for pool in buckets.pools for tiles in pool.tiles}))
    assert buckets.cached_tokens == sum(pool.slots * pool.capacity for pool in buckets.pools)
    assert hash(buckets) == hash(Buckets.plan(context, config))
    assert buckets == Buckets.plan(context, config)


def check(pool: Pool, config: EngineConfig) -> None:
    """The pool's calls cover its slots and the tokens of a call, and long slots take no more memory."""
    assert pool.rows == tuple(sorted(set(pool.rows)))
    assert pool.rows[0] >= MIN_ROWS
    assert pool.rows[-1] == pool.slots
    assert pool.slots * pool.capacity <= max(config.max_num_seqs * 1024, MIN_ROWS * pool.capacity)
    assert pool.tiles == tuple(sorted(set(pool.tiles)))
    assert pool.tiles[0] >= 1
    tokens = pool.tiles[-1] * TILE
    assert tokens <= max(config.max_num_batched_tokens, TILE) < tokens + TILE
    if config.deterministic:
        assert len(pool.rows) == len(pool.tiles) == 1
    else:
        assert pool.rows[0] == MIN_ROWS
        assert pool.tiles[0] == 1


@given(contexts, configs)
@example(1 << 20, EngineConfig(max_num_seqs=512))
def test_programs_are_few_and_have_names_of_their_own(context: int, config: EngineConfig):
    buckets = Buckets.plan(context, config)
    names = buckets.programs()
    prefills = sum(len(pool.tiles) for pool in buckets.pools)
    decodes = sum(len(pool.rows) for pool in buckets.pools)
    copies = 2 * len(buckets.pools) - 1
    assert len(names) == prefills + decodes + copies + len(buckets.tiles) <= MOST_PROGRAMS
    assert len(set(names)) == len(names)


@given(contexts, configs, st.data())
def test_a_step_computes_the_fewest_rows_that_cover_its_slots(
    context: int, config: EngineConfig, data: st.DataObject
):
    for pool in Buckets.plan(context, config).pools:
        used = data.draw(st.integers(1, pool.slots))
        assert pool.rows_for(used) == min(rows for rows in pool.rows if rows >= used)


@given(contexts, configs, st.one_of(st.integers(0, 20), st.integers(0, 1 << 15)))
@example(4096, EngineConfig(), 2)
@example(4096, EngineConfig(), 3)
@example(4096, EngineConfig(), 6)
def test_a_prefill_call_is_the_largest_of_which_three_quarters_are_used(
    context: int, config: EngineConfig, waiting: int
):
    for pool in Buckets.plan(context, config).pools:
        tiles = pool.tiles_for(waiting)
        assert tiles in pool.tiles
        assert tiles == pool.tiles[0] or waiting / tiles >= 0.75
        assert not [more for more in pool.tiles if more > tiles and waiting / more >= 0.75]


def test_buckets_are_frozen():
    buckets = Buckets.plan(512, EngineConfig())
    for frozen in (buckets, buckets.pools[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            frozen.__setattr__(dataclasses.fields(frozen)[0].name, None)
