"""Quantized tensors to float32 or bfloat16, bit for bit as ggml expands them.

One entry of `FORMATS` describes each GGML type; this file checks sizes and writes the values.
"""

from math import prod

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quant import grids, kquants, legacy, small_tables
from realm_jax.quant.chunks import for_each_chunk
from realm_jax.quant.formats import BlockFormat, CastFormat, Format, Parts

__all__ = [
    "FORMATS",
    "BlockFormat",
    "CastFormat",
    "Format",
    "Parts",
    "dequantize",
    "dequantize_into",
    "supported",
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS: dict[GGMLType, Format] = {
    GGMLType.F64: CastFormat(np.dtype("<f8")),
    GGMLType.F32: CastFormat(np.dtype("<f4")),
    GGMLType.F16: CastFormat(np.dtype("<f2")),
    GGMLType.BF16: CastFormat(BFLOAT16),
    GGMLType.I8: CastFormat(np.dtype("<i1")),
    GGMLType.I16: CastFormat(np.dtype("<i2")),
    GGMLType.I32: CastFormat(np.dtype("<i4")),
    GGMLType.I64: CastFormat(np.dtype("<i8")),
    **legacy.FORMATS,
    **kquants.FORMATS,
    **small_tables.FORMATS,
    **grids.FORMATS,
}


def supported(ggml_type: int) -> bool:
    """Whether `dequantize` knows the type."""
    return ggml_type in FORMATS


def dequantize(
    data: UInt8[np.ndarray, "..."], ggml_type: int, shape: tuple[int, ...]
) -> Float32[np.ndarray, "..."]:
    """The tensor's values as float32 of `shape`, equal to ggml's bit for bit (any NaN for a NaN).

    Raises ModelFileError for an unknown type, and for data that is not exactly as long as `shape` says.
    """
    kind = checked_type(data, ggml_type, shape)
    out = np.empty(shape, np.float32)
    _fill(data, kind, out)
    return out


def dequantize_into(data: UInt8[np.ndarray, "..."], ggml_type: int, out: Float[np.ndarray, "..."]) -> None:
    """`out` holds the tensor's values; bfloat16 is rounded from float32, to nearest even.

    `out` is C-contiguous, float32 or bfloat16. Raises ModelFileError as `dequantize` does.
    """
    if out.dtype not in (np.float32, BFLOAT16) or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} with strides {out.strides}; C-contiguous float32 or bfloat16 needed"
        )
    _fill(data, checked_type(data, ggml_type, out.shape), out)


def checked_type(data: np.ndarray, ggml_type: int, shape: tuple[int, ...]) -> GGMLType:
    """The type, which is known and in which `shape` takes exactly `data`'s bytes; else ModelFileError."""
    if ggml_type not in FORMATS:
        raise ModelFileError(f"ggml type {int(ggml_type)} is unknown")
    kind = GGMLType(ggml_type)
    block = BLOCK_SIZES[kind]
    row = shape[-1] if shape else 1
    if min(shape, default=0) < 0 or row % block.elements:
        raise ModelFileError(
            f"shape {shape}: rows are not made of {kind.name} blocks of {block.elements} values"
        )
    expected = prod(shape) // block.elements * block.nbytes
    if data.nbytes != expected:
        raise ModelFileError(f"data is {data.nbytes} bytes; {kind.name} of shape {shape} takes {expected}")
    return kind


def _fill(data: np.ndarray, kind: GGMLType, out: np.ndarray) -> None:
    """Write every value to `out`, chunk by chunk, on all cores."""
    block = BLOCK_SIZES[kind]
    source = np.ascontiguousarray(data).reshape(-1, block.nbytes)
    target = out.reshape(-1, block.elements)

    def fill_chunk(chunk: slice) -> None:
        blocks, values = source[chunk].reshape(-1), target[chunk].reshape(-1)
        if out.dtype == np.float32:
            FORMATS[kind].fill(blocks, values)
        else:
            wide = np.empty(values.size, np.float32)
            FORMATS[kind].fill(blocks, wide)
            values[:] = wide

    for_each_chunk(fill_chunk, len(source), block.elements)
