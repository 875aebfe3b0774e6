"""Rows as blocks of 32 values with one scale: Q4_0, Q4_1, Q5_0, Q5_1, with ggml's bits (ggml-quants.c).

Without an importance matrix the extremes of a block decide; with one, the searches of `search`.
"""

import numpy as np
from jaxtyping import Float32

from realm_jax.ggml import GGMLType
from realm_jax.quant.encoding.layout import Bytes, Importance, Rows, as_rows, blocked, grouped, packed
from realm_jax.quant.encoding.search import F, Tries, Values, affine, signed_largest, symmetric
from realm_jax.quant.int8 import quantize_q8_0
from realm_jax.quant.legacy import FORMATS

BLOCK = 32
TRIES = Tries(-0.9, 0.05, 36)


def q4_0(rows: Rows, importance: Importance) -> Bytes:
    codes, scale = _symmetric(rows, importance, 8)
    return _blocks(rows, GGMLType.Q4_0, codes, d=scale)


def q5_0(rows: Rows, importance: Importance) -> Bytes:
    codes, scale = _symmetric(rows, importance, 16)
    return _blocks(rows, GGMLType.Q5_0, codes, d=scale)


def q4_1(rows: Rows, importance: Importance) -> Bytes:
    codes, scale, least = _affine(rows, importance, 15)
    return _blocks(rows, GGMLType.Q4_1, codes, d=scale, m=least)


def q5_1(rows: Rows, importance: Importance) -> Bytes:
    codes, scale, least = _affine(rows, importance, 31)
    return _blocks(rows, GGMLType.Q5_1, codes, d=scale, m=least)


def q8_0(rows: Rows, importance: Importance) -> Bytes:
    """Importance changes nothing: the largest magnitude of a block decides."""
    return quantize_q8_0(rows)


def _symmetric(rows: Rows, importance: Importance, top: int) -> tuple[np.ndarray, np.ndarray]:
    values = grouped(rows, BLOCK)
    if importance is not None:
        return symmetric(values, _weights(rows, importance), top)
    scale = signed_largest(values) / F(-top)
    return _truncated(values, scale, F(top) + F(0.5), 2 * top - 1), scale


def _affine(rows: Rows, importance: Importance, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    values = grouped(rows, BLOCK)
    if importance is not None:
        codes, scale, minimum = affine(values, _weights(rows, importance), top, TRIES)
        return codes, scale, -minimum
    least = values.min(axis=0)
    scale = (values.max(axis=0) - least) / F(top)
    return _truncated(values - least, scale, F(0.5), top), scale, least


def _truncated(values: Values, scale: np.ndarray, offset: np.float32, top: int) -> np.ndarray:
    """values / scale + offset without its fraction, from 0 to top."""
    inverse = np.divide(F(1), scale, out=np.zeros_like(scale), where=scale != 0)
    places = values * inverse
    places += offset
    return np.trunc(np.fmax(np.fmin(places, F(top)), F(0)))


def _weights(rows: Rows, importance: Float32[np.ndarray, " I"]) -> Values:
    """Importance times the root of what the value and its row's mean add up to, squared."""
    squares = rows * rows
    mean = np.add.accumulate(squares, axis=1)[:, -1:] / F(rows.shape[1])
    return grouped(importance * np.sqrt(mean + squares), BLOCK)


def _blocks(rows: Rows, kind: GGMLType, codes: np.ndarray, **factors: np.ndarray) -> Bytes:
    layout = FORMATS[kind].layout
    out = np.empty(rows.size // BLOCK, layout)
    for name, factor in factors.items():
        out[name] = factor[:, None]
    whole = blocked(codes, BLOCK)
    out["qs"] = packed(whole, run=16, width=4)
    if "qh" in (layout.names or ()):
        out["qh"] = np.packbits(whole >> 4, axis=1, bitorder="little")
    return as_rows(out, rows)


ENCODERS = {
    GGMLType.Q4_0: q4_0,
    GGMLType.Q4_1: q4_1,
    GGMLType.Q5_0: q5_0,
    GGMLType.Q5_1: q5_1,
    GGMLType.Q8_0: q8_0,
}
