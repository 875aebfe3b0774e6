"""Containers -> tiles, in NumPy: the layout of `kernels.tiles`, made once when a model is loaded."""

import numpy as np
from jaxtyping import Shaped, UInt8

from realm_jax.kernels.tiles import BLOCK_INPUTS, LANES, TileFormat
from realm_jax.quant.containers import Packed

MIDDLE = 128
"""What is added to signed codes to make them unsigned."""


def tile(packed: Packed) -> tuple[UInt8[np.ndarray, "L bytes"], TileFormat]:
    """The weight `[out, in]` in tiles, rows of zeros filling the last; `in` is a multiple of 32."""
    form = tile_format(packed)
    tiles = np.zeros((-(-packed.shape[0] // LANES), form.record), np.uint8)
    if packed.table is None:
        parts = [_tiled_bytes(packed.codes.view(np.uint8) ^ np.uint8(MIDDLE))]
    else:
        parts = [_tiled_indices(packed.codes)]
    factors = (packed.super_scale, packed.group_scale, packed.super_min, packed.group_min)
    parts += [_tiled_factor(factor) for factor in factors if factor is not None]
    start = 0
    for part in parts:
        tiles[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return tiles, form


def tile_format(packed: Packed) -> TileFormat:
    """What its tiles are made of."""
    table, offset = (), MIDDLE
    if packed.table is not None:
        values = packed.table.astype(int)
        if (np.diff(values) == 1).all():
            offset = -int(values[0])
        else:
            table = tuple(int(value) for value in values + MIDDLE)
    return TileFormat(
        inputs=packed.shape[1],
        group=min(packed.group, BLOCK_INPUTS),
        super_group=packed.super_group,
        bits=8 if packed.table is None else 4,
        table=table,
        offset=offset,
        factor=packed.super_scale.dtype.name,
        has_bytes=packed.group_scale is not None,
        has_minimum=packed.super_min is not None,
    )


def _tiled_bytes(codes: UInt8[np.ndarray, "O I"]) -> UInt8[np.ndarray, "L bytes"]:
    codes = _whole_tiles(codes)
    vectors = codes.reshape(-1, LANES, codes.shape[1] // BLOCK_INPUTS, 8, 4).transpose(0, 2, 3, 1, 4)
    return vectors.reshape(len(vectors), -1)


def _tiled_indices(pairs: UInt8[np.ndarray, "O P"]) -> UInt8[np.ndarray, "L bytes"]:
    """From bytes that hold an even column's index in their lower half, the next one's in the upper."""
    words = np.ascontiguousarray(_whole_tiles(pairs)).view("<u2")  # four inputs: 0x3210
    words = words.reshape(-1, LANES, words.shape[1] // 8, 8).transpose(0, 2, 3, 1)  # [L, B, 8 vectors, 16]
    low, high = words[:, :, :4].astype(np.uint32), words[:, :, 4:].astype(np.uint32)
    vectors = np.ascontiguousarray(_spread(low) | _spread(high) << 4)
    return vectors.view(np.uint8).reshape(len(vectors), -1)


def _spread(words: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Four indices of 16 bits, each in the lower half of a byte of its own."""
    words = (words | words << 8) & np.uint32(0x00FF00FF)
    return (words | words << 4) & np.uint32(0x0F0F0F0F)


def _tiled_factor(factor: Shaped[np.ndarray, "O S"]) -> UInt8[np.ndarray, "L bytes"]:
    """[L, S, 16] as bytes; those that multiply are at most 127, and so int8 as they stand."""
    factor = _whole_tiles(factor)
    tiled = np.ascontiguousarray(factor.reshape(-1, LANES, factor.shape[1]).swapaxes(1, 2))
    return tiled.view(np.uint8).reshape(len(tiled), -1)


def _whole_tiles(rows: Shaped[np.ndarray, "O _"]) -> Shaped[np.ndarray, "filled _"]:
    """Rows of zeros appended until they fill tiles."""
    missing = -len(rows) % LANES
    return np.pad(rows, ((0, missing), (0, 0))) if missing else rows
