"""Attention over a slot cache for GPUs: a program per row, kv head, tile of queries and split of the cache.

One kernel serves prompts, verification and decoding. Where the cache is split, as in decoding, programs
leave partial results and a second kernel combines them: so one long sequence fills the chip. Splits have a
fixed length, whatever the batch.

B rows, S slots, C capacity, K kv heads, M stacked queries of a kv head, H head dim, W the next power of two,
Z splits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from realm_jax.errors import CapacityError
from realm_jax.kernels.pallas.attention_softmax import FLOOR, Form, arithmetic, empty, finish, visit

LEAST = 16
"""The smallest side of a product on a GPU's matrix units."""

COMBINED = 16
"""Splits that are combined at a time."""


@dataclass(frozen=True)
class Blocks:
    """What one program takes at a time."""

    rows: int  # stacked queries, at most
    positions: int  # of the cache, at most
    split: int  # positions of a split of the cache; 0 = all
    warps: int
    stages: int

    def fitted(self, queries: int, capacity: int) -> "Blocks":
        """For so many stacked queries and such a capacity: powers of two, splits of whole blocks."""
        positions = min(_power(self.positions), _power(capacity))
        split = -(-self.split // positions) * positions
        rows = min(_power(self.rows), _power(queries))
        return Blocks(rows, positions, split if split < capacity else 0, self.warps, self.stages)


def _power(n: int) -> int:
    """The next power of two that a product may have as a side."""
    return max(LEAST, pl.next_power_of_2(n))


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
    _check_offsets(k)
    K, M, H = q.shape[1:]
    C, W = k.shape[2], _power(H)
    blocks = blocks.fitted(M, C)
    tail = -M % blocks.rows
    q = jnp.pad(q.astype(arithmetic(k.dtype)), ((0, 0), (0, 0), (0, tail), (0, W - H)))
    padded = jnp.pad(at, ((0, 0), (0, tail)), constant_values=-1)
    if sinks is not None:
        sinks = jnp.pad(sinks, ((0, 0), (0, tail)))
    if not blocks.split:
        out = _attend(q, k, v, scales, slots, padded, sinks, form, blocks, M, interpret)[0]
        return out[:, :, :M, :H]
    partial = _attend(q, k, v, scales, slots, padded, None, form, blocks, M, interpret)
    if sinks is None:
        sinks = jnp.full((K, M), FLOOR, jnp.float32)
    return _combine(partial, at, sinks, form, blocks.split, interpret)[..., :H]


def _check_offsets(k: Array) -> None:
    """The compiler counts bytes in 32 bits up to 4 GiB, with a sign."""
    if 2**31 < k.size <= 2**32 // k.dtype.itemsize:
        raise CapacityError(
            f"a layer's keys are {k.size:,} numbers of one byte; a GPU kernel addresses 2,147,483,648 "
            "(lower --max-num-seqs or --ctx-size)"
        )


def _attend(
    q: Array,
    k: Array,
    v: Array,
    scales: tuple[Array, Array] | None,
    slots: Array,
    at: Array,
    sinks: Array | None,
    form: Form,
    blocks: Blocks,
    queries: int,
    interpret: bool,
) -> Sequence[Array]:
    """[out] finished, or out, largest scores and totals of each split."""
    B, K, M, W = q.shape
    splits = -(-k.shape[2] // blocks.split) if blocks.split else 1
    tile = pl.BlockSpec((None, None, blocks.rows, W), lambda b, h, m, z: (b, h, m, 0))
    row = pl.BlockSpec((None, blocks.rows), lambda b, h, m, z: (b, m))
    head = pl.BlockSpec((None, blocks.rows), lambda b, h, m, z: (h, m))
    out = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    out_shape, out_specs = [out], [tile]
    if blocks.split:
        Z = -(-splits // COMBINED) * COMBINED
        part = pl.BlockSpec((None, None, blocks.rows, None, W), lambda b, h, m, z: (b, h, m, z, 0))
        number = pl.BlockSpec((None, None, blocks.rows, None), lambda b, h, m, z: (b, h, m, z))
        out_shape = [jax.ShapeDtypeStruct((B, K, queries, Z, W), jnp.float32)]
        out_shape += [jax.ShapeDtypeStruct((B, K, queries, Z), jnp.float32)] * 2
        out_specs = [part, number, number]
    return pl.pallas_call(
        functools.partial(_kernel, form=form, blocks=blocks, queries=queries),
        grid=(B, K, M // blocks.rows, splits),
        in_specs=[
            tile,
            *[pl.BlockSpec()] * 2,
            None if scales is None else (pl.BlockSpec(),) * 2,
            pl.BlockSpec(),
            row,
            None if sinks is None else head,
        ],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="attention_splits" if blocks.split else "attention",
    )(q, k, v, scales, slots, at, sinks)


def _kernel(
    q_ref: Any,  # [rows, W]
    k_ref: Any,  # [S, K, C, H]
    v_ref: Any,  # [S, K, C, H]
    scale_refs: tuple[Any, Any] | None,  # [S, K, C]
    slots_ref: Any,  # [B]
    at_ref: Any,  # [rows]
    sinks_ref: Any,  # [rows]
    out_ref: Any,  # [rows, W], of one split where there are several
    *partial_refs: Any,  # [rows]
    form: Form,
    blocks: Blocks,
    queries: int,
) -> None:
    row, head, tile, split = (pl.program_id(axis) for axis in range(4))
    S, C = k_ref.shape[0], k_ref.shape[2]
    at = at_ref[:]
    begin, end = _visible_blocks(at, split, C, form, blocks)
    slot = jnp.minimum(slots_ref[row], S - 1)  # an idle row may name a slot past the last

    def block(q: Array, i: Array, state: Any) -> Any:
        start = i * blocks.positions
        at_block = (slot, head, start, blocks)
        kv = _load(k_ref, *at_block, q.shape[1]), _load(v_ref, *at_block, q.shape[1])
        scales = None
        if scale_refs is not None:
            scales = _load_scales(scale_refs[0], *at_block), _load_scales(scale_refs[1], *at_block)
        places = start + jnp.arange(blocks.positions, dtype=jnp.int32)[None, :]
        return visit(state, q, kv, scales, at[:, None], places, form)

    def visited() -> Any:
        sinks = None if sinks_ref is None else sinks_ref[:][:, None]
        return jax.lax.fori_loop(
            begin, end, functools.partial(block, q_ref[:, :]), empty(sinks, *q_ref.shape)
        )

    if not partial_refs:
        out_ref[:, :] = finish(visited())
        return

    @pl.when(begin < end)
    def _() -> None:
        best, total, out = visited()
        is_real = tile * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32) < queries
        plgpu.store(out_ref.at[:, :], out, mask=is_real[:, None])
        for ref, numbers in zip(partial_refs, (best, total), strict=True):
            plgpu.store(ref.at[:], numbers.reshape(blocks.rows), mask=is_real)


def _visible_blocks(
    at: Array, split: Array, capacity: int, form: Form, blocks: Blocks
) -> tuple[Array, Array]:
    """The blocks of a split that some query sees; none where all are idle."""
    length = blocks.split or -(-capacity // blocks.positions) * blocks.positions
    begin = split * length
    end = jnp.minimum(jnp.max(at) + 1, begin + length)
    if form.window is not None:
        begin = jnp.maximum(begin, jnp.min(jnp.where(at < 0, capacity, at)) - form.window + 1)
    return jax.lax.div(begin, blocks.positions), jax.lax.div(end + blocks.positions - 1, blocks.positions)


def _load(ref: Any, slot: Array, head: Array, start: Array, blocks: Blocks, width: int) -> Array:
    """[positions, W] of a slot's head; what the cache does not have is 0."""
    C, H = ref.shape[2:]
    places, lanes = pl.ds(start, blocks.positions), pl.ds(0, width)
    if C % blocks.positions == 0 and width == H:
        return ref[slot, head, places, lanes]
    exists = (start + jnp.arange(blocks.positions, dtype=jnp.int32) < C)[:, None]
    mask = exists & (jnp.arange(width, dtype=jnp.int32) < H)[None, :]
    return plgpu.load(ref.at[slot, head, places, lanes], mask=mask, other=0)


def _load_scales(ref: Any, slot: Array, head: Array, start: Array, blocks: Blocks) -> Array:
    C, places = ref.shape[2], pl.ds(start, blocks.positions)
    if C % blocks.positions == 0:
        return ref[slot, head, places][None, :]
    exists = start + jnp.arange(blocks.positions, dtype=jnp.int32) < C
    return plgpu.load(ref.at[slot, head, places], mask=exists, other=0)[None, :]


def _combine(
    partial: Sequence[Array], at: Array, sinks: Array, form: Form, split: int, interpret: bool
) -> Float[Array, "B K M W"]:
    """The mean over all splits of each query."""
    B, K, M, Z, W = partial[0].shape
    number = pl.BlockSpec((None, None, None, Z), lambda b, h, m: (b, h, m, 0))
    return pl.pallas_call(
        functools.partial(_combine_kernel, form=form, split=split),
        grid=(B, K, M),
        in_specs=[
            pl.BlockSpec((None, None, None, Z, W), lambda b, h, m: (b, h, m, 0, 0)),
            number,
            number,
            pl.BlockSpec(),
            pl.BlockSpec(),
        ],
        out_specs=pl.BlockSpec((None, None, None, W), lambda b, h, m: (b, h, m, 0)),
        out_shape=jax.ShapeDtypeStruct((B, K, M, W), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_combine",
    )(*partial, at, sinks)


def _combine_kernel(
    parts_ref: Any,  # [Z, W]
    best_ref: Any,  # [Z]
    total_ref: Any,  # [Z]
    at_ref: Any,  # [B, M]
    sinks_ref: Any,  # [K, M]
    out_ref: Any,  # [W]
    *,
    form: Form,
    split: int,
) -> None:
    row, head, query = (pl.program_id(axis) for axis in range(3))
    at, sink = at_ref[row, query], sinks_ref[head, query]
    first = 0 if form.window is None else jnp.maximum(at - form.window + 1, 0)
    begin, end = jax.lax.div(first, split), jax.lax.div(at + split, split)
    # a sink that is none has the weight exp(FLOOR - FLOOR) before any split, and 0 after one

    def chunk(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        best, total, out = state
        start = i * COMBINED
        splits = start + jnp.arange(COMBINED, dtype=jnp.int32)
        was_visited, here = (splits >= begin) & (splits < end), pl.ds(start, COMBINED)
        bests = plgpu.load(best_ref.at[here], mask=was_visited, other=FLOOR)
        totals = plgpu.load(total_ref.at[here], mask=was_visited, other=0)
        parts = plgpu.load(parts_ref.at[here, :], mask=was_visited[:, None], other=0)
        new = jnp.maximum(best, jnp.max(bests))
        weights, rescale = jnp.exp(bests - new), jnp.exp(best - new)
        total = total * rescale + jnp.sum(totals * weights)
        return new, total, out * rescale + jnp.sum(parts * weights[:, None], axis=0)

    state = (sink, jnp.ones((), jnp.float32), jnp.zeros(out_ref.shape, jnp.float32))
    chunks = jax.lax.div(begin, COMBINED), jax.lax.div(end + COMBINED - 1, COMBINED)
    _, total, out = jax.lax.fori_loop(*chunks, chunk, state)
    out_ref[:] = out / total
