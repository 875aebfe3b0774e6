"""The one door to the operations worth a kernel. Plain arrays in, plain arrays out."""

from realm_jax.kernels.attention import attention
from realm_jax.kernels.reference import (
    grouped_matmul,
    layer_norm,
    matmul,
    per_head_matmul,
    rms_norm,
    row_sum,
)
from realm_jax.kernels.selection import first_argmax, threshold, top_k
from realm_jax.kernels.threefry import threefry

__all__ = [
    "attention",
    "first_argmax",
    "grouped_matmul",
    "layer_norm",
    "matmul",
    "per_head_matmul",
    "rms_norm",
    "row_sum",
    "threefry",
    "threshold",
    "top_k",
]
