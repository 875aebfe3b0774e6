"""Rows to groups, and codes to GGML's bytes: what `formats.planes` and the splits of `kquants` undo."""

import numpy as np
from jaxtyping import Float32, UInt8

Rows = Float32[np.ndarray, "R I"]
Importance = Float32[np.ndarray, " I"] | None
"""How much the square of an error counts in each column."""
Bytes = UInt8[np.ndarray, "R bytes"]


def grouped(rows: Float32[np.ndarray, "R I"], size: int) -> Float32[np.ndarray, "size G"]:
    """Value i of every group of `size` neighbours in row i."""
    return np.ascontiguousarray(rows.reshape(-1, size).T)


def blocked(groups: np.ndarray, size: int) -> UInt8[np.ndarray, "n size"]:
    """Codes [values, groups] as bytes, the `size` codes of each block in a row."""
    return np.ascontiguousarray(groups.astype(np.uint8).T).reshape(-1, size)


def packed(codes: UInt8[np.ndarray, "n E"], run: int, width: int) -> UInt8[np.ndarray, "n bytes"]:
    """The lowest `width` bits of the codes in planes, as `formats.planes` reads them."""
    count = 8 // width
    fields = codes.reshape(len(codes), -1, count, run) & np.uint8((1 << width) - 1)
    out = fields[:, :, 0].copy()
    for plane in range(1, count):
        out |= fields[:, :, plane] << np.uint8(plane * width)
    return out.reshape(len(codes), -1)


def six_bit_bytes(
    scales: UInt8[np.ndarray, "n 8"], minima: UInt8[np.ndarray, "n 8"]
) -> UInt8[np.ndarray, "n 12"]:
    """Eight scales and eight minima of 6 bits in 12 bytes, as `kquants.six_bit_scales` reads them."""
    first = [each[:, :4] | (each[:, 4:] >> 4 << 6) for each in (scales, minima)]
    return np.hstack([*first, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4])


def as_rows(blocks: np.ndarray, rows: Rows) -> Bytes:
    """The bytes of the blocks that the rows became."""
    return blocks.view(np.uint8).reshape(len(rows), -1)
