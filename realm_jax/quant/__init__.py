"""Quantized tensors to float32 or bfloat16, bit for bit as ggml expands them.

One entry of `FORMATS` describes each GGML type; this file checks sizes and spreads the work over threads.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod

import ml_dtypes
import numpy as np
from jaxtyping import Float, Float32, UInt8

from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quant import grids, kquants, legacy, small_tables
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
# Values a thread takes at a time: its temporaries stay in the cache, and bound the memory in use.
CHUNK = 2**18


def supported(ggml_type: int) -> bool:
    """Whether `dequantize` knows the type."""
    return ggml_type in FORMATS


def dequantize(
    data: UInt8[np.ndarray, "..."], ggml_type: int, shape: tuple[int, ...]
) -> Float32[np.ndarray, "..."]:
    """The tensor's values as float32 of `shape`, equal to ggml's bit for bit (any NaN for a NaN).

    Raises ModelFileError for an unknown type, and for data that is not exactly as long as `shape` says.
    """
    kind = _checked_type(data, ggml_type, shape)
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
    _fill(data, _checked_type(data, ggml_type, out.shape), out)


def _checked_type(data: np.ndarray, ggml_type: int, shape: tuple[int, ...]) -> GGMLType:
    """The type, if `data` is what a tensor of `shape` takes in it."""
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
    blocks_per_chunk = CHUNK // block.elements

    def fill_chunk(start: int) -> None:
        chunk = slice(start, start + blocks_per_chunk)
        blocks, values = source[chunk].reshape(-1), target[chunk].reshape(-1)
        # Infinite and NaN scales are values like others; to look for them is not this function's task.
        with np.errstate(all="ignore"):
            if out.dtype == np.float32:
                FORMATS[kind].fill(blocks, values)
            else:
                wide = np.empty(values.size, np.float32)
                FORMATS[kind].fill(blocks, wide)
                values[:] = wide

    _on_all_cores(fill_chunk, range(0, len(source), blocks_per_chunk))


def _on_all_cores(task: Callable[[int], None], arguments: Iterable[int]) -> None:
    arguments = list(arguments)
    run = map if len(arguments) == 1 else _threads().map  # a hand-over to a thread costs more than one chunk
    for _ in run(task, arguments):
        pass


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "dequantize")


# Threads do not survive a fork; a child makes its own.
os.register_at_fork(after_in_child=_threads.cache_clear)
