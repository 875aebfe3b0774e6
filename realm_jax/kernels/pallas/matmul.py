"""The kernel of a device for products by quantized weights, and its block sizes for so many rows.

M rows, I inputs, O outputs, E experts, T tiles.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

from realm_jax.kernels.pallas import matmul_gpu, matmul_tpu
from realm_jax.kernels.pallas.tuning import Target, sizes, target
from realm_jax.kernels.words import WordFormat

FEW_ROWS = 64
"""Up to so many rows a product is bound by memory."""

LEAST_ROWS = 16
"""The fewest rows of a tile, on GPUs for their matrix units, on TPUs for bf16's sublanes."""


def matmul(
    x: Float[Array, "M I"],
    words: Int32[Array, "units height O"],
    form: WordFormat,
    where: Target | None = None,
) -> Float32[Array, "M O"]:
    """`x @ weight` in x's type, summed in float32. where: the device; None: that of this process.

    A row's bits depend on that row and the device's block sizes; up to 64 rows, not on how many they are.
    """
    where = where or target()
    blocks = blocks_for(x.shape[0], x.dtype, where)
    x = jnp.pad(x, ((0, 0), (0, form.padded - form.inputs)))
    kernel = matmul_tpu.matmul if where.platform == "tpu" else matmul_gpu.matmul
    return kernel(x, words[None], None, form, blocks, interpret=where.interpret)


def grouped_matmul(
    x: Float[Array, "T M I"],
    words: Int32[Array, "E units height O"],
    expert: Int[Array, "T"],
    form: WordFormat,
    where: Target | None = None,
) -> Float32[Array, "T M O"]:
    """`x[t] @ weight[expert[t]]`; zero where the expert is -1.

    M: a power of two, 16 at least. Of experts that no tile names nothing is read.
    """
    where = where or target()
    T, M, _ = x.shape
    blocks = replace(blocks_for(M, x.dtype, where), rows=M)
    rows = jnp.pad(x.reshape(T * M, -1), ((0, 0), (0, form.padded - form.inputs)))
    kernel = matmul_tpu.matmul if where.platform == "tpu" else matmul_gpu.matmul
    return kernel(rows, words, expert, form, blocks, interpret=where.interpret).reshape(T, M, -1)


def blocks_for(rows: int, dtype: jnp.dtype, where: Target) -> Any:
    """What a program takes at a time."""
    bucket = f"{'few' if rows <= FEW_ROWS else 'many'}/{jnp.dtype(dtype).name}"
    kind = matmul_tpu.Blocks if where.platform == "tpu" else matmul_gpu.Blocks
    return fitted(kind(**sizes(f"matmul_{where.platform}", where.kind, bucket)), rows)


def fitted(blocks: Any, rows: int) -> Any:
    """The blocks with no more rows than there are."""
    return replace(blocks, rows=min(blocks.rows, max(LEAST_ROWS, 1 << (rows - 1).bit_length())))
