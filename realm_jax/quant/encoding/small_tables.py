"""Rows as blocks of 32 indices into a table: IQ4_NL and MXFP4, with ggml's bits (ggml-quants.c)."""

import numpy as np

from realm_jax.ggml import GGMLType
from realm_jax.quant.encoding.layout import Bytes, Importance, Rows, as_rows, blocked, grouped, packed
from realm_jax.quant.encoding.search import ALL_ZERO, F, quotient, signed_largest, total
from realm_jax.quant.small_tables import E2M1, E8M0, FORMATS, IQ4

BLOCK = 32
TRIES = 7  # on each side of the first scale

LOW, HIGH = IQ4[0], IQ4[-1]
_DOUBLED = np.add(IQ4[1:], IQ4[:-1])  # twice the borders between neighbours: whole numbers
NEAREST = np.searchsorted(_DOUBLED, np.arange(2 * LOW, 2 * HIGH + 1), side="right").astype(np.uint8)
"""The index of the nearest entry of IQ4, the upper of two, by twice a value, rounded down."""
NEAREST_VALUE = np.array(IQ4, np.float32)[NEAREST]
# Between the magnitudes of E2M1, doubled; a value in the middle gets the smaller one.
E2M1_BORDERS = np.array(E2M1[:7], np.float32) / 2 + np.array(E2M1[1:8], np.float32) / 2


def iq4_nl(rows: Rows, importance: Importance) -> Bytes:
    """The scale of each block is searched under the values' squares as weights, or under importance."""
    values = grouped(rows, BLOCK)
    weights = values * values
    if importance is not None:
        spread = F(2) / F(BLOCK) * total(weights)
        weights = np.sqrt(spread + weights) * grouped(np.broadcast_to(importance, rows.shape), BLOCK)
    scale = _searched(values, weights)
    inverse = np.divide(F(1), scale, out=np.zeros_like(scale), where=scale != 0)
    out = np.empty(rows.size // BLOCK, FORMATS[GGMLType.IQ4_NL].layout)
    out["d"] = scale[:, None]
    out["qs"] = packed(blocked(NEAREST[_places(values, inverse)], BLOCK), run=16, width=4)
    return as_rows(out, rows)


def _searched(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The scale of each group [32, G] under which the nearest entries of IQ4 lie best."""
    largest = signed_largest(values)
    is_zero = np.abs(largest) < ALL_ZERO
    largest[is_zero] = 1

    def sums(inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = NEAREST_VALUE[_places(values, inverse)]
        weighted = weights * found
        return total(weighted * values), total(weighted * found)

    sum_qx, sum_q2 = sums(1 / (-largest / F(LOW)))
    scale = quotient(sum_qx, sum_q2)
    best = scale * sum_qx
    for step in range(-TRIES, TRIES + 1):
        sum_qx, sum_q2 = sums(F(step + LOW) / largest)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        found = quotient(sum_qx, sum_q2)
        np.copyto(scale, found, where=better)
        np.copyto(best, found * sum_qx, where=better)
    scale[is_zero] = 0
    return scale


def _places(values: np.ndarray, inverse: np.ndarray) -> np.ndarray:
    """Where `NEAREST` has the scaled values."""
    places = values * inverse
    places *= 2
    np.floor(places, out=places)
    places = np.fmax(np.fmin(places, F(2 * HIGH)), F(2 * LOW))
    places -= F(2 * LOW)
    return places.astype(np.intp)


def mxfp4(rows: Rows, importance: Importance) -> Bytes:
    """Importance changes nothing: the exponent is two below that of the largest magnitude."""
    values = rows.reshape(-1, BLOCK)
    largest = np.abs(values).max(axis=1)
    exponent = np.where(largest > 0, np.floor(np.log2(largest)) - 2 + 127, 0).clip(0, 254).astype(np.uint8)
    places = np.abs(values) / E8M0[exponent][:, None]
    codes = np.searchsorted(E2M1_BORDERS, places, side="left").astype(np.uint8)
    codes += np.uint8(8) * ((values < 0) & (codes > 0))
    out = np.empty(len(values), FORMATS[GGMLType.MXFP4].layout)
    out["e"] = exponent[:, None]
    out["qs"] = packed(codes, run=16, width=4)
    return as_rows(out, rows)


ENCODERS = {GGMLType.IQ4_NL: iq4_nl, GGMLType.MXFP4: mxfp4}
