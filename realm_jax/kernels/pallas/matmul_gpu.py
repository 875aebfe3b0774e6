"""Products by quantized weights on GPUs: a program per tile of rows, tile of outputs and split of the inputs.

One kernel serves decoding and prompts; they differ in block sizes. A run of weights goes from its words to
the matrix units through registers and is never written back. With few rows, splits of the inputs make
enough programs to fill the chip; how many depends on the weight alone, and their sums are added in order.

M rows, I inputs (padded to whole units), O outputs, E experts, Z splits.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int, Int32

from realm_jax.kernels.words import WordFormat, unit_weights

LEAST = 16
"""The smallest side of a product on a GPU's matrix units."""


@dataclass(frozen=True)
class Blocks:
    """What one program takes at a time."""

    rows: int
    outputs: int
    programs: int  # the inputs are split until there are as many, rows left aside; 0 = never
    warps: int
    stages: int

    def splits(self, form: WordFormat, outputs: int) -> int:
        """Parts of the inputs, a power of two, each of one unit at least."""
        splits, tiles = 1, -(-outputs // self.outputs)
        while tiles * splits < self.programs and 2 * splits <= form.units:
            splits *= 2
        return splits


def matmul(
    x: Float[Array, "M I"],
    words: Int32[Array, "E units height O"],
    expert: Int[Array, "tiles"] | None,
    form: WordFormat,
    blocks: Blocks,
    *,
    interpret: bool,
) -> Float32[Array, "M O"]:
    """`x @ weight` in x's type. expert: by whose weight each tile of rows is multiplied.

    None: the first's; -1: no one's, the result is zero.
    """
    tail = -x.shape[0] % blocks.rows
    rows, columns = x.shape[0], words.shape[-1]
    splits = blocks.splits(form, columns)
    parts = pl.pallas_call(
        functools.partial(_kernel, form=form, blocks=blocks, splits=splits),
        grid=((rows + tail) // blocks.rows, -(-columns // blocks.outputs), splits),
        in_specs=[pl.BlockSpec(), pl.BlockSpec(), None if expert is None else pl.BlockSpec()],
        out_specs=pl.BlockSpec(),
        out_shape=jax.ShapeDtypeStruct((splits, rows, columns), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="quantized_matmul",
    )(jnp.pad(x, ((0, tail), (0, 0))), words, expert)
    return functools.reduce(jnp.add, parts)  # pyright: ignore[reportReturnType]


def _kernel(
    x_ref: Any,  # [M, I]
    words_ref: Any,  # [E, units, height, O]
    expert_ref: Any,  # [tiles]
    out_ref: Any,  # [Z, M, O]
    *,
    form: WordFormat,
    blocks: Blocks,
    splits: int,
) -> None:
    tile, column, split = (pl.program_id(axis) for axis in range(3))
    rows = pl.ds(tile * blocks.rows, blocks.rows)
    columns = pl.ds(column * blocks.outputs, blocks.outputs)
    chosen = jnp.int32(0) if expert_ref is None else expert_ref[tile]
    expert = jnp.maximum(chosen, 0)
    places = column * blocks.outputs + jnp.arange(blocks.outputs, dtype=jnp.int32)
    exists = (places < words_ref.shape[-1])[None, :]

    def add_unit(unit: Array, total: Array) -> Array:
        def words(first: int, count: int) -> Array:
            return plgpu.load(words_ref.at[expert, unit, pl.ds(first, count), columns], mask=exists, other=0)

        for start, weights in unit_weights(form, words):
            x = x_ref[rows, pl.ds(unit * form.unit + start, form.run)]
            total = total + _dot(x, weights.astype(x.dtype))
        return total

    length = -(-form.units // splits)
    end = jnp.where(chosen < 0, 0, jnp.minimum((split + 1) * length, form.units))
    total = jnp.zeros((blocks.rows, blocks.outputs), jnp.float32)
    total = jax.lax.fori_loop(split * length, end, add_unit, total)
    is_real = tile * blocks.rows + jnp.arange(blocks.rows, dtype=jnp.int32) < out_ref.shape[1]
    plgpu.store(out_ref.at[split, rows, columns], total, mask=is_real[:, None] & exists)


def _dot(x: Array, weights: Array) -> Array:
    """In float32, and of float32 without TF32."""
    return jax.lax.dot_general(
        x,
        weights,
        (((1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
