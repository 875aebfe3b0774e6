"""Matrices as they lie in a file -> weight nodes, stored and multiplied as a run's numerics say."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import jax
import ml_dtypes
import numpy as np

from realm_jax.config import Numerics
from realm_jax.ggml import GGMLType
from realm_jax.kernels.tiles import BLOCK_INPUTS, LANES
from realm_jax.native_nodes import NativeDense, NativeQuantized, NativeScale
from realm_jax.nodes import Dense, Kernel, Quantized, Scale, Stacked
from realm_jax.quant import FORMATS, BlockFormat, dequantize_into
from realm_jax.quant.containers import Packed, pack
from realm_jax.quant.tiling import tile, tile_format


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix `shape` = (out, in) in GGML's blocks."""

    data: np.ndarray  # uint8
    kind: GGMLType
    shape: tuple[int, int]


def projection(parts: Sequence[Stored], numerics: Numerics) -> Kernel:
    """The parts stacked along their outputs: in one node where they are stored alike."""
    if numerics.weights == "dense":
        return _dense(parts, numerics)
    runs = [list(run) for _, run in groupby(parts, lambda part: part.kind)]
    nodes = [_quantized(run, numerics) if _has_tiles(run[0]) else _dense(run, numerics) for run in runs]
    return nodes[0] if len(nodes) == 1 else Stacked(tuple(nodes))


def scale(vector: np.ndarray, numerics: Numerics) -> Scale:
    """The factors of a norm."""
    return (NativeScale if numerics.kernels == "native" else Scale)(jax.device_put(vector))


def planned_bytes(parts: Sequence[Stored], numerics: Numerics) -> int:
    """What the arrays of the parts' node will take."""
    if numerics.weights == "dense":
        return sum(_planned_dense(part, numerics) for part in parts)
    total = 0
    for _, group in groupby(parts, lambda part: part.kind):
        run = list(group)
        rows = sum(part.shape[0] for part in run)
        if _has_tiles(run[0]):
            row = np.zeros(run[0].data.nbytes // run[0].shape[0], np.uint8)
            total += -(-rows // LANES) * tile_format(_packed(row, run[0].kind, (1, run[0].shape[1]))).record
        else:
            total += sum(_planned_dense(part, numerics) for part in run)
    return total


def _has_tiles(part: Stored) -> bool:
    return isinstance(FORMATS[part.kind], BlockFormat) and part.shape[1] % BLOCK_INPUTS == 0


def _quantized(parts: Sequence[Stored], numerics: Numerics) -> Quantized:
    """Parts of one type: their blocks one after another are those of one matrix."""
    data = parts[0].data if len(parts) == 1 else np.concatenate([part.data.reshape(-1) for part in parts])
    kind, shape = parts[0].kind, (sum(part.shape[0] for part in parts), parts[0].shape[1])
    tiles, form = tile(_packed(data, kind, shape))
    node = NativeQuantized if numerics.kernels == "native" else Quantized
    return node(jax.device_put(tiles), form=form, outputs=shape[0])


def _packed(data: np.ndarray, kind: GGMLType, shape: tuple[int, int]) -> Packed:
    packed = pack(data, kind, shape)
    assert packed is not None, f"{kind.name} is no block format"
    return packed


def _dense(parts: Sequence[Stored], numerics: Numerics) -> Dense:
    rows, inputs = [part.shape[0] for part in parts], parts[0].shape[1]
    weight = _aligned_empty((sum(rows), inputs), _storage(numerics))
    for part, target in zip(parts, np.split(weight, np.cumsum(rows)[:-1]), strict=True):
        dequantize_into(part.data, part.kind, target)
    is_native = numerics.kernels == "native" and inputs % BLOCK_INPUTS == 0
    return (NativeDense if is_native else Dense)(jax.device_put(weight))


def _planned_dense(part: Stored, numerics: Numerics) -> int:
    return part.shape[0] * part.shape[1] * _storage(numerics).itemsize


def _storage(numerics: Numerics) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if numerics.dtype == "bfloat16" else np.float32)


def _aligned_empty(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array at a 64-byte boundary, which a CPU device adopts without a copy."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
