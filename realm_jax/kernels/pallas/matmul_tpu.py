"""Products by quantized weights on TPUs: a tile of rows by a tile of outputs, the inputs block by block.

The words of a block are expanded into a scratch matrix beside the matrix unit, and one product follows: the
unit is as deep as many runs. Scales are rows, so that they are spread over sublanes, never over lanes.

M rows, I inputs (padded to whole units), O outputs, E experts.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from realm_jax.kernels.words import WordFormat, unit_weights


@dataclass(frozen=True)
class Blocks:
    """What one step takes."""

    rows: int
    outputs: int
    inputs: int  # at most, if one unit is not more

    def units(self, form: WordFormat) -> int:
        """Units of a step: as many as fit and divide all."""
        most = max(1, self.inputs // form.unit)
        return max(count for count in range(1, most + 1) if form.units % count == 0)


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
    rows, columns = x.shape[0] + tail, words.shape[-1]
    units = blocks.units(form)
    tiles = rows // blocks.rows
    if expert is None:
        expert = jnp.zeros(tiles, jnp.int32)
    outputs = min(blocks.outputs, -(-columns // 128) * 128)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(tiles, -(-columns // outputs), form.units // units),
        in_specs=[
            pl.BlockSpec((blocks.rows, units * form.unit), lambda m, o, i, expert: (m, i)),
            pl.BlockSpec(
                (None, units, form.height, outputs),
                lambda m, o, i, expert: (jnp.maximum(expert[m], 0), i, 0, o),
            ),
        ],
        out_specs=pl.BlockSpec((blocks.rows, outputs), lambda m, o, i, expert: (m, o)),
        scratch_shapes=[pltpu.VMEM((units * form.unit, outputs), x.dtype)],
    )
    return pl.pallas_call(
        functools.partial(_kernel, form=form, units=units),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((rows, columns), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="quantized_matmul",
    )(expert, jnp.pad(x, ((0, tail), (0, 0))), words)[: rows - tail]  # pyright: ignore[reportReturnType]


def _kernel(
    expert_ref: Any,  # [tiles]
    x_ref: Any,  # [rows, inputs]
    words_ref: Any,  # [units, height, outputs]
    out_ref: Any,  # [rows, outputs]
    weights_ref: Any,  # [inputs, outputs]
    *,
    form: WordFormat,
    units: int,
) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)

    @pl.when(expert_ref[pl.program_id(0)] >= 0)
    def _() -> None:
        _expand(words_ref, weights_ref, form, units)
        out_ref[...] += jax.lax.dot_general(
            x_ref[...],
            weights_ref[...],
            (((1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )


def _expand(words_ref: Any, weights_ref: Any, form: WordFormat, units: int) -> None:
    """The weights of a step stand in its scratch matrix."""

    @pl.loop(0, units)
    def _(unit: Array) -> None:
        for start, weights in unit_weights(
            form, lambda first, count: words_ref[unit, first : first + count, :]
        ):
            rows = pl.ds(pl.multiple_of(unit * form.unit, form.unit) + start, form.run)
            weights_ref[rows, :] = weights.astype(weights_ref.dtype)
