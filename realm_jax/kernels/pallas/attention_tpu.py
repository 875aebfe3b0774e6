"""Attention over a slot cache for TPUs: a core walks the grid in order, the compiler fetches blocks ahead.

One kernel serves prompts, verification and decoding; splitting the cache would fill nothing, as a core is
one program. Which block comes next is read from scalars that are there before the grid starts: blocks that
no query of a tile sees are neither fetched nor computed.

Heads of fewer than 128 numbers work, but XLA keeps such a cache in another layout and copies it for the call.

B rows, S slots, C capacity, K kv heads, M stacked queries of a kv head, H head dim, Q tiles of queries.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from realm_jax.errors import UnsupportedError
from realm_jax.kernels.pallas.attention_softmax import Form, arithmetic, empty, finish, visit

LANES = 128
SUBLANES = 16
"""Rows of a tile of bf16; of float32 it has half as many."""

SCALE_ROWS = 8
"""Heads whose scales are fetched at once, unless all are: a tile of float32."""

FAST_BYTES = 10 << 20
"""Of the 16 MiB of fast memory that a kernel gets, for blocks that are fetched while others are computed."""


@dataclass(frozen=True)
class Blocks:
    """What one step of the grid takes."""

    rows: int  # stacked queries, at most
    positions: int  # of the cache, at most; a multiple of 128
    heads: int = 0  # kv heads, at most; 0 = as many as fit

    def fitted(self, q: Array, k: Array, has_scales: bool) -> "Blocks":
        """For these shapes: whole tiles, heads that divide all heads and fit the fast memory."""
        K, M, H = q.shape[1:]
        C = k.shape[2]
        rows = min(-(-self.rows // SUBLANES), -(-M // SUBLANES)) * SUBLANES
        positions = C if self.positions >= C else -(-self.positions // LANES) * LANES
        width = -(-H // LANES) * LANES
        # twice keys and values; twice queries and results; the state
        each = 4 * positions * width * k.dtype.itemsize + rows * (4 * 4 * width + 4 * width + 8 * LANES)
        most = max(1, min(self.heads or K, FAST_BYTES // each))
        step = SCALE_ROWS if has_scales else 1
        heads = max((h for h in range(step, most + 1, step) if K % h == 0), default=step)
        return Blocks(rows, positions, heads if K % heads == 0 else K)


def attention(
    q: Float[Array, "B K M H"],
    k: Array,  # [S, K, C, H]
    v: Array,  # [S, K, C, H]
    scales: tuple[Float[Array, "S K C"], Float[Array, "S K C"]] | None,
    slots: Int[Array, "B"],
    at: Int[Array, "B M"],
    sinks: Float[Array, "K M"] | None,
    form: Form,
    blocks: Blocks,
    *,
    interpret: bool,
) -> Float[Array, "B K M H"]:
    """What each query sees of its slot. at: positions; -1 where a query is idle."""
    if k.dtype == jnp.float16:
        raise UnsupportedError("TPUs do not multiply float16 caches; use kv_dtype='bfloat16' or 'float32'")
    B, M = q.shape[0], q.shape[2]
    blocks = blocks.fitted(q, k, scales is not None)
    tail = -M % blocks.rows
    q = jnp.pad(q.astype(arithmetic(k.dtype)), ((0, 0), (0, 0), (0, tail), (0, 0)))
    at = jnp.pad(at, ((0, 0), (0, tail)), constant_values=-1)
    if sinks is not None:
        sinks = jnp.pad(sinks, ((0, 0), (0, tail)))[..., None]
    slots = jnp.minimum(slots, k.shape[0] - 1)  # an idle row may name a slot past the last
    begin, end = _visible_blocks(at.reshape(B, -1, blocks.rows), k.shape[2], form, blocks)
    out = pl.pallas_call(
        functools.partial(_kernel, form=form, blocks=blocks, capacity=k.shape[2]),
        grid_spec=_grid(q, k, scales, sinks, blocks, jnp.maximum(jnp.max(end - begin), 1)),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="attention",
    )(slots, begin.reshape(-1), end.reshape(-1), q, k, v, scales, at[..., None], sinks)
    return out[:, :, :M]


def _visible_blocks(
    at: Int[Array, "B Q M"], capacity: int, form: Form, blocks: Blocks
) -> tuple[Array, Array]:
    """[B, Q]: the blocks that some query of a tile sees; none where all are idle."""
    begin = jnp.zeros(at.shape[:2], at.dtype)
    if form.window is not None:
        first = jnp.min(jnp.where(at < 0, capacity, at), axis=-1)
        begin = jnp.clip(first - form.window + 1, 0, capacity - 1) // blocks.positions
    return begin, -(-(jnp.max(at, axis=-1) + 1) // blocks.positions)


def _grid(
    q: Array, k: Array, scales: Any, sinks: Array | None, blocks: Blocks, steps: Array
) -> pltpu.PrefetchScalarGridSpec:
    """steps: the most blocks that any tile visits; a tile of fewer ends with empty steps."""
    B, K, M, H = q.shape
    rows, heads, tiles = blocks.rows, blocks.heads, M // blocks.rows

    def fetched(b: Any, m: Any, i: Any, begin: Any, end: Any) -> Any:
        """The block of a step; the last one again where none is left, which is not fetched anew."""
        tile = b * tiles + m
        return jnp.maximum(jnp.minimum(begin[tile] + i, end[tile] - 1), 0)

    def of_cache(b: Any, h: Any, m: Any, i: Any, slots: Any, begin: Any, end: Any) -> tuple[Any, ...]:
        return slots[b], h, fetched(b, m, i, begin, end), 0

    def of_scales(b: Any, h: Any, m: Any, i: Any, slots: Any, begin: Any, end: Any) -> tuple[Any, ...]:
        return slots[b], h, fetched(b, m, i, begin, end)

    def of_queries(b: Any, h: Any, m: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, h, m, 0

    tile = pl.BlockSpec((None, heads, rows, H), of_queries)
    cache = pl.BlockSpec((None, heads, blocks.positions, H), of_cache)
    scale = pl.BlockSpec((None, heads, blocks.positions), of_scales)
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(B, K // heads, tiles, steps),
        in_specs=[
            tile,
            cache,
            cache,
            None if scales is None else (scale, scale),
            pl.BlockSpec((None, rows, 1), lambda b, h, m, i, *_: (b, m, 0)),
            None if sinks is None else pl.BlockSpec((heads, rows, 1), lambda b, h, m, i, *_: (h, m, 0)),
        ],
        out_specs=tile,
        scratch_shapes=[
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, LANES), jnp.float32),
            pltpu.VMEM((heads, rows, H), jnp.float32),
        ],
    )


def _kernel(
    _slots_ref: Any,  # [B]
    begin_ref: Any,  # [B * Q]
    end_ref: Any,  # [B * Q]
    q_ref: Any,  # [heads, rows, H]
    k_ref: Any,  # [heads, positions, H]
    v_ref: Any,  # [heads, positions, H]
    scale_refs: tuple[Any, Any] | None,  # [heads, positions]
    at_ref: Any,  # [rows, 1]
    sinks_ref: Any,  # [heads, rows, 1]
    out_ref: Any,  # [heads, rows, H]
    best_ref: Any,  # [heads, rows, LANES], each lane the same
    total_ref: Any,  # [heads, rows, LANES]
    sum_ref: Any,  # [heads, rows, H]
    *,
    form: Form,
    blocks: Blocks,
    capacity: int,
) -> None:
    row, tile, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    place = row * pl.num_programs(2) + tile
    block = begin_ref[place] + i
    heads, rows, H = q_ref.shape

    def keep(head: int, state: Any) -> None:
        best, total, out = state
        best_ref[head] = jnp.broadcast_to(best, (rows, LANES))
        total_ref[head] = jnp.broadcast_to(total, (rows, LANES))
        sum_ref[head] = out

    @pl.when(i == 0)
    def _() -> None:
        for head in range(heads):
            keep(head, empty(None if sinks_ref is None else sinks_ref[head], rows, H))

    @pl.when(block < end_ref[place])
    def _() -> None:
        start = block * blocks.positions
        places = start + jax.lax.broadcasted_iota(jnp.int32, (1, blocks.positions), 1)
        for head in range(heads):
            state = best_ref[head][:, :1], total_ref[head][:, :1], sum_ref[head]
            kv = k_ref[head], _existing(v_ref[head], start, capacity)
            scales = None
            if scale_refs is not None:
                k_scale, v_scale = (ref[head : head + 1, :] for ref in scale_refs)
                scales = k_scale, jnp.where(places < capacity, v_scale, 0.0)
            keep(head, visit(state, q_ref[head], kv, scales, at_ref[:, :], places, form))

    @pl.when(i == pl.num_programs(3) - 1)
    def _() -> None:
        for head in range(heads):
            state = best_ref[head][:, :1], total_ref[head][:, :1], sum_ref[head]
            out_ref[head] = finish(state)


def _existing(values: Array, start: Array, capacity: int) -> Array:
    """0 for positions past the capacity: memory holds anything there, and 0 * NaN is NaN."""
    if capacity % values.shape[0] == 0:
        return values
    places = start + jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
    return jnp.where(places < capacity, values, jnp.zeros((), values.dtype))
