"""Weights rounded to int8, which loses something: under a scale for each chunk of inputs, or ggml's Q8_0."""

import numpy as np
from jaxtyping import Float32, Int8, UInt8

SMALLEST_CHUNK, LARGEST_CHUNK = 192, 512
BLOCK = 32
"""Inputs of a block of Q8_0: a float16 scale, then a code for each."""
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))


def chunk_inputs(inputs: int) -> int | None:
    """How many inputs share a scale: the smallest divisor that is not too small; None where there is none.

    Each chunk is a product of its own, so more chunks take longer; larger ones cost accuracy, and beyond 512
    inputs their sums could not be exact. A row of few inputs is one chunk.
    """
    if inputs < SMALLEST_CHUNK:
        return inputs
    chunks = range(SMALLEST_CHUNK, LARGEST_CHUNK + 1)
    return next((chunk for chunk in chunks if inputs % chunk == 0), None)


@np.errstate(all="ignore")  # infinite and NaN weights are values like others
def round_chunks(
    values: Float32[np.ndarray, "O I"], chunk: int
) -> tuple[Int8[np.ndarray, "O C K"], Float32[np.ndarray, "O C"]]:
    """The codes from -127 to 127 that are nearest to the values, and the scale of each chunk."""
    chunks = values.reshape(len(values), -1, chunk)
    scales = _largest(chunks) / np.float32(127)
    step = np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales)[..., None]
    return np.rint(chunks / step).astype(np.int8), scales


@np.errstate(all="ignore")  # infinite and NaN weights are values like others
def quantize_q8_0(values: Float32[np.ndarray, "O I"]) -> UInt8[np.ndarray, "O bytes"]:
    """The rows as blocks of Q8_0, bit for bit as ggml's quantize_row_q8_0_ref makes them."""
    blocks = values.reshape(len(values), -1, BLOCK)
    scales = _largest(blocks) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    places = blocks * inverse[..., None]
    places += np.copysign(BELOW_HALF, places)  # then truncated: halves are rounded away from zero
    out = np.empty((*scales.shape, 2 + BLOCK), np.uint8)
    out[..., :2] = scales.astype("<f2")[..., None].view(np.uint8)
    out[..., 2:] = places.astype(np.int8).view(np.uint8)
    return out.reshape(len(values), -1)


def _largest(groups: Float32[np.ndarray, "O G n"]) -> Float32[np.ndarray, "O G"]:
    """The largest magnitude of each group."""
    return np.abs(groups).max(axis=-1)
