"""What lies in a file -> weight nodes, stored and multiplied as a run's numerics say."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby
from math import prod

import jax
import ml_dtypes
import numpy as np

from realm_jax.config import Numerics, RopeConfig
from realm_jax.experts import Experts, Groupable, joined
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels.native.tiling import tile_into
from realm_jax.kernels.tiles import BLOCK_INPUTS, LANES
from realm_jax.native_nodes import NativeDense, NativeQuantized, NativeRotary, NativeScale
from realm_jax.nodes import (
    CenteredScale,
    Dense,
    Int8,
    Kernel,
    PerHead,
    Quantized,
    Rotary,
    Scale,
    Stacked,
    Words,
)
from realm_jax.quant import FORMATS, BlockFormat, checked_type, dequantize, dequantize_into
from realm_jax.quant.chunks import CHUNK
from realm_jax.quant.containers import Packed, pack
from realm_jax.quant.int8 import chunk_inputs, quantize_q8_0, round_chunks
from realm_jax.quant.tiling import tile, tile_format
from realm_jax.quant.wording import word_format, words
from realm_jax.rope import frequencies

NUMBERS = (GGMLType.F64, GGMLType.F32, GGMLType.F16, GGMLType.BF16)
"""What int8 rounds where the C++ kernels multiply: other types are rounded already."""


class Layout(Enum):
    """How a matrix is stored."""

    DENSE = auto()
    BLOCKS = auto()  # the file's own codes
    ROUNDED_BLOCKS = auto()  # Q8_0, made of plain numbers
    CHUNKS = auto()  # int8 codes for XLA


@dataclass(frozen=True, eq=False)
class Stored:
    """A matrix `shape` = (out, in) in GGML's blocks."""

    data: np.ndarray  # uint8
    kind: GGMLType
    shape: tuple[int, int]

    def values(self, first: int, last: int) -> np.ndarray:
        """Some of its rows in float32."""
        row = self.data.nbytes // self.shape[0]
        return dequantize(self.data[first * row : last * row], self.kind, (last - first, self.shape[1]))

    def layout(self, numerics: Numerics) -> Layout:
        """How it is stored in a run with these numerics."""
        inputs = self.shape[1]
        if numerics.weights == "int8" and numerics.kernels == "xla":
            return Layout.DENSE if chunk_inputs(inputs) is None else Layout.CHUNKS
        if numerics.weights == "dense" or inputs % BLOCK_INPUTS:
            return Layout.DENSE
        if isinstance(FORMATS[self.kind], BlockFormat):
            return Layout.BLOCKS
        is_rounded = numerics.weights == "int8" and self.kind in NUMBERS
        return Layout.ROUNDED_BLOCKS if is_rounded else Layout.DENSE


def projection(parts: Sequence[Stored], numerics: Numerics) -> Kernel:
    """The parts stacked along their outputs: in one node where they are stored alike."""
    nodes = [_node(layout, run, numerics) for layout, run in _runs(parts, numerics)]
    return nodes[0] if len(nodes) == 1 else Stacked(tuple(nodes))


def _runs(parts: Sequence[Stored], numerics: Numerics) -> Iterator[tuple[Layout, list[Stored]]]:
    """Neighbours that one node holds: blocks are of one type."""

    def alike(part: Stored) -> tuple[Layout, GGMLType | None]:
        layout = part.layout(numerics)
        return layout, part.kind if layout is Layout.BLOCKS else None

    return ((layout, list(run)) for (layout, _), run in groupby(parts, alike))


def _node(layout: Layout, parts: list[Stored], numerics: Numerics) -> Kernel:
    match layout:
        case Layout.DENSE:
            return _dense(parts, numerics)
        case Layout.BLOCKS:
            return _blocks(parts, numerics)
        case Layout.ROUNDED_BLOCKS:
            return _rounded_blocks(parts, numerics)
        case Layout.CHUNKS:
            return _chunks(parts)


def experts(each: Mapping[str, Mapping[str, Kernel]], numerics: Numerics) -> Experts:
    """The experts of a layer as one node, of "gate_up" and "down" of each by number.

    Stacked for the kernels of GPU and TPU, for XLA there, and for the C++ kernels, which join tiles of one
    expert themselves. XLA on a CPU multiplies groups by all experts: there each stays by itself.
    """
    gate_up, down = (list(each[name].values()) for name in ("gate_up", "down"))
    if numerics.kernels == "native":
        return joined(gate_up, down, stacked=(NativeQuantized, NativeDense), tile=1)
    is_device = numerics.kernels == "pallas" or jax.default_backend() != "cpu"
    return joined(gate_up, down, stacked=Groupable if is_device else ())


def scale(vector: np.ndarray, numerics: Numerics) -> Scale:
    """The factors of a norm."""
    return (NativeScale if numerics.kernels == "native" else Scale)(jax.device_put(vector))


def centered_scale(vector: np.ndarray, bias: np.ndarray | None) -> CenteredScale:
    """The factors of a norm that subtracts the mean."""
    shift = np.zeros_like(vector) if bias is None else bias
    return CenteredScale(jax.device_put(vector), jax.device_put(shift))


def per_head(matrices: np.ndarray, numerics: Numerics) -> PerHead:
    """A matrix for each head [N, O, I], expanded."""
    return PerHead(jax.device_put(matrices.astype(_storage(numerics))))


def dense_bytes(shape: Sequence[int], numerics: Numerics) -> int:
    """What so many plain numbers take."""
    return prod(shape) * _storage(numerics).itemsize


def rotary(config: RopeConfig, factors: np.ndarray | None, numerics: Numerics) -> Rotary:
    """The turns of one kind of layer; factors: divisors of its frequencies, one a pair."""
    node = NativeRotary if numerics.kernels == "native" else Rotary
    frequency = jax.device_put(frequencies(config, factors))
    return node(frequency, magnitude=config.magnitude, interleaved=config.interleaved)


def planned_bytes(parts: Sequence[Stored], numerics: Numerics) -> int:
    """What the arrays of the parts' node will take."""
    return sum(_planned(layout, run, numerics) for layout, run in _runs(parts, numerics))


def _planned(layout: Layout, parts: list[Stored], numerics: Numerics) -> int:
    rows, inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
    match layout:
        case Layout.DENSE:
            return rows * inputs * _storage(numerics).itemsize
        case Layout.CHUNKS:
            chunk = chunk_inputs(inputs)
            assert chunk is not None
            return rows * (inputs + inputs // chunk * 4)
        case _:
            kind = parts[0].kind if layout is Layout.BLOCKS else GGMLType.Q8_0
            return prod(_array_kind(numerics).shape(_zero_row(kind, inputs), rows))


def _blocks(parts: list[Stored], numerics: Numerics) -> Kernel:
    """Parts of one type: their blocks one after another are those of one matrix."""
    data = parts[0].data if len(parts) == 1 else np.concatenate([part.data.reshape(-1) for part in parts])
    kind, shape = parts[0].kind, (sum(part.shape[0] for part in parts), parts[0].shape[1])
    checked_type(data, kind, shape)
    array = _array_kind(numerics)(kind, shape)
    array.fill(0, data, shape[0])
    return array.node(numerics)


def _rounded_blocks(parts: list[Stored], numerics: Numerics) -> Kernel:
    """Parts of plain numbers, rounded to Q8_0."""
    shape = sum(part.shape[0] for part in parts), parts[0].shape[1]
    array = _array_kind(numerics)(GGMLType.Q8_0, shape)
    for first, values in _slices(parts):
        array.fill(first, quantize_q8_0(values), len(values))
    return array.node(numerics)


def _chunks(parts: list[Stored]) -> Int8:
    """Parts of any type, rounded to int8 under a scale for each chunk."""
    rows, inputs = sum(part.shape[0] for part in parts), parts[0].shape[1]
    chunk = chunk_inputs(inputs)
    assert chunk is not None
    count = inputs // chunk
    codes = [_aligned_empty((rows, chunk), np.dtype(np.int8)) for _ in range(count)]
    scales = _aligned_empty((count, rows), np.dtype(np.float32))
    for first, values in _slices(parts):
        here = slice(first, first + len(values))
        found, scales.T[here] = round_chunks(values, chunk)
        for target, code in zip(codes, found.swapaxes(0, 1), strict=True):
            target[here] = code
    return Int8(tuple(map(jax.device_put, codes)), jax.device_put(scales))


def _slices(parts: list[Stored]) -> Iterator[tuple[int, np.ndarray]]:
    """The parts' rows in float32, a few at a time, each time with the first row's number."""
    for first, last in _spans((sum(part.shape[0] for part in parts), parts[0].shape[1])):
        yield first, _values(parts, first, last)


def _spans(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Neighbouring rows of such a matrix, whole tiles of them, that fit a processor's cache."""
    rows, inputs = shape
    step = LANES * max(1, CHUNK // (LANES * inputs))
    return ((first, min(rows, first + step)) for first in range(0, rows, step))


def _values(parts: list[Stored], first: int, last: int) -> np.ndarray:
    """Rows of the parts one after another."""
    pieces = []
    for part in parts:
        rows = part.shape[0]
        if (low := max(first, 0)) < (high := min(last, rows)):
            pieces.append(part.values(low, high))
        first, last = first - rows, last - rows
    return np.concatenate(pieces)


class _Tiles:
    """A matrix in tiles, for the C++ kernels and plain formulas."""

    def __init__(self, kind: GGMLType, shape: tuple[int, int]) -> None:
        self._kind, self._shape = kind, shape
        self._form = tile_format(_zero_row(kind, shape[1]))
        self._array = _aligned_empty(self.shape(_zero_row(kind, shape[1]), shape[0]), np.dtype(np.uint8))

    @staticmethod
    def shape(row: Packed, rows: int) -> tuple[int, int]:
        """Of the array for so many rows; in bytes, as `_Words.shape`."""
        return -(-rows // LANES), tile_format(row).record

    def fill(self, first: int, data: np.ndarray, rows: int) -> None:
        """The rows from `first` on, which begins a tile, are those in `data`."""
        tiles = self._array[first // LANES : -(-(first + rows) // LANES)]
        shape = (rows, self._shape[1])
        if not tile_into(tiles, data, self._kind, shape):
            tiles[:] = tile(_packed(data, self._kind, shape))[0]

    def node(self, numerics: Numerics) -> Kernel:
        kind = NativeQuantized if numerics.kernels == "native" else Quantized
        return kind(jax.device_put(self._array), form=self._form, outputs=self._shape[0])


class _Words:
    """A matrix in words, for the GPU and TPU kernels."""

    def __init__(self, kind: GGMLType, shape: tuple[int, int]) -> None:
        self._kind, self._inputs = kind, shape[1]
        self._form = word_format(_zero_row(kind, shape[1]))
        self._array = np.empty((self._form.units, self._form.height, shape[0]), np.int32)

    @staticmethod
    def shape(row: Packed, rows: int) -> tuple[int, int]:
        """Of the array for so many rows, in bytes."""
        form = word_format(row)
        return form.units * form.height, 4 * rows

    def fill(self, first: int, data: np.ndarray, rows: int) -> None:
        """The rows from `first` on are those in `data`."""
        blocks = data.reshape(rows, -1)
        for low, high in _spans((rows, self._inputs)):
            packed = _packed(blocks[low:high].reshape(-1), self._kind, (high - low, self._inputs))
            self._array[:, :, first + low : first + high] = words(packed)

    def node(self, numerics: Numerics) -> Kernel:
        return Words(jax.device_put(self._array), form=self._form, dtype=numerics.dtype)


def _array_kind(numerics: Numerics) -> type[_Tiles] | type[_Words]:
    return _Words if numerics.kernels == "pallas" else _Tiles


def _zero_row(kind: GGMLType, inputs: int) -> Packed:
    """A row of zeros of this type: it shows what layouts are made of."""
    block = BLOCK_SIZES[kind]
    return _packed(np.zeros(inputs // block.elements * block.nbytes, np.uint8), kind, (1, inputs))


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


def _storage(numerics: Numerics) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if numerics.dtype == "bfloat16" else np.float32)


def _aligned_empty(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array at a 64-byte boundary, which a CPU device adopts without a copy."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
