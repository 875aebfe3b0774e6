"""The one door to the two operations worth a kernel. Plain arrays in, plain arrays out."""

from realm_jax.kernels.reference import attention, matmul, row_sum

__all__ = ["attention", "matmul", "row_sum"]
