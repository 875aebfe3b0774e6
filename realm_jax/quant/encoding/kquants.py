"""Rows as super-blocks of 256 values: Q2_K to Q6_K, with ggml's bits (ggml-quants.c).

The scale of each group is searched first; the scales of a block are then rounded under one super-scale, and
the codes are made anew for what was stored. An importance matrix weights the search.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from realm_jax.ggml import GGMLType
from realm_jax.quant.encoding.layout import (
    Bytes,
    Importance,
    Rows,
    as_rows,
    blocked,
    grouped,
    packed,
    six_bit_bytes,
)
from realm_jax.quant.encoding.search import (
    ALL_ZERO,
    F,
    Tries,
    Values,
    affine,
    positive,
    quotient,
    refined_symmetric,
    signed_largest,
    symmetric,
    total,
)
from realm_jax.quant.kquants import FORMATS

BLOCK = 256
WEIGHTED_TRIES = Tries(-0.9, 0.05, 36)


@dataclass(frozen=True)
class AffineType:
    """Groups of `group` codes up to `top`, their scales and minima in codes up to `factor_top`.

    spread: what the block's mean square is multiplied by in the weights of an importance matrix.
    """

    group: int
    top: int
    factor_top: int
    tries: Tries
    spread: float


Q2_K = AffineType(16, 3, 15, Tries(-0.5, 0.1, 15, is_absolute=True), 1)
Q4_K = AffineType(32, 15, 63, Tries(-1.0, 0.1, 20), 2)
Q5_K = AffineType(32, 31, 63, Tries(-0.5, 0.1, 15), 2)


def q2_k(rows: Rows, importance: Importance) -> Bytes:
    weights = _importance_weights(rows, importance, Q2_K.group, Q2_K.spread)
    plain = np.abs(grouped(rows, Q2_K.group)) if weights is None else None
    out, codes, scales, minima = _affine_blocks(rows, Q2_K, weights, plain, GGMLType.Q2_K)
    out["scales"] = scales | minima << 4
    out["qs"] = packed(codes, run=32, width=2)
    return as_rows(out, rows)


def q4_k(rows: Rows, importance: Importance) -> Bytes:
    out, codes, scales, minima = _six_bit_blocks(rows, importance, Q4_K, GGMLType.Q4_K)
    out["scales"] = six_bit_bytes(scales, minima)
    out["qs"] = packed(codes, run=32, width=4)
    return as_rows(out, rows)


def q5_k(rows: Rows, importance: Importance) -> Bytes:
    out, codes, scales, minima = _six_bit_blocks(rows, importance, Q5_K, GGMLType.Q5_K)
    out["scales"] = six_bit_bytes(scales, minima)
    out["qh"] = packed(codes >> 4, run=32, width=1)
    out["qs"] = packed(codes, run=32, width=4)
    return as_rows(out, rows)


def q3_k(rows: Rows, importance: Importance) -> Bytes:
    values, out = grouped(rows, 16), _empty(rows, GGMLType.Q3_K)
    weights = _importance_weights(rows, importance, 16, 2)
    if weights is None:
        codes, scale = refined_symmetric(values, 4)
        scales, d = _rounded_scales(scale.reshape(-1, 16), 32)
        scales = np.where(d == 0, 0, scales.clip(-32, 31) + 32).astype(np.uint8)
    else:
        codes, scale = symmetric(values, weights, 4)
        found, d = symmetric(_per_block(scale, 16), _per_block(total(weights), 16), 32)
        scales, d = blocked(found, 16), d[:, None]
    out["d"] = d
    out["scales"] = np.hstack([packed(scales, run=8, width=4), packed(scales >> 4, run=4, width=2)])
    step = _stored(out["d"]) * (scales.astype(np.float32) - F(32))
    codes = _codes_again(values, step, None, codes, -4, 3)
    out["hmask"] = packed(codes >> 2, run=32, width=1)
    out["qs"] = packed(codes, run=32, width=2)
    return as_rows(out, rows)


def q6_k(rows: Rows, importance: Importance) -> Bytes:
    values, out = grouped(rows, 16), _empty(rows, GGMLType.Q6_K)
    weights = values * values
    if importance is not None:
        weights = grouped(np.broadcast_to(importance, rows.shape), 16)
    codes, scale = symmetric(values, weights, 32)
    scales, out["d"] = _rounded_scales(scale.reshape(-1, 16), 128)
    out["scales"] = np.minimum(scales, 127)
    codes = _codes_again(values, _stored(out["d"]) * out["scales"], None, codes, -32, 31)
    out["ql"] = packed(codes, run=64, width=4)
    out["qh"] = packed(codes >> 4, run=32, width=2)
    out[np.abs(scale).reshape(-1, 16).max(axis=1) < ALL_ZERO] = 0
    return as_rows(out, rows)


def _six_bit_blocks(
    rows: Rows, importance: Importance, kind: AffineType, ggml_type: GGMLType
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    weights, plain = _importance_weights(rows, importance, kind.group, kind.spread), None
    if weights is None:
        values = grouped(rows, kind.group)
        plain = np.abs(values) + np.sqrt(total(values * values) / F(kind.group))
    return _affine_blocks(rows, kind, weights, plain, ggml_type)


def _affine_blocks(
    rows: Rows, kind: AffineType, weights: Values | None, plain: Values | None, ggml_type: GGMLType
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Blocks with their super-scales and -minima set; the codes; the scales and minima in codes.

    One of the weights is given: from an importance matrix, or plain ones, with which the super-factors
    are not searched.
    """
    values, out, count = grouped(rows, kind.group), _empty(rows, ggml_type), BLOCK // kind.group
    if weights is None:
        assert plain is not None
        codes, *factors = affine(values, plain, kind.top, kind.tries)
        stored = [_largest_first(each.reshape(-1, count), kind.factor_top) for each in factors]
    else:
        codes, *factors = affine(values, weights, kind.top, WEIGHTED_TRIES)
        sums = _per_block(total(weights), count)
        found = [positive(_per_block(each, count), sums, kind.factor_top) for each in factors]
        stored = [(blocked(each, count), d[:, None]) for each, d in found]
    (scales, out["d"]), (minima, out["dmin"]) = stored
    step, minimum = _stored(out["d"]) * scales, _stored(out["dmin"]) * minima
    return out, _codes_again(values, step, minimum, codes, 0, kind.top), scales, minima


def _importance_weights(rows: Rows, importance: Importance, group: int, spread: float) -> Values | None:
    """Importance times the root of what the value and its block's mean add up to, squared."""
    if importance is None:
        return None
    squares = (rows * rows).reshape(-1, BLOCK)
    mean = F(spread) * np.add.accumulate(squares, axis=1)[:, -1:] / F(BLOCK)
    weights = np.sqrt(mean + squares).reshape(rows.shape)
    return grouped(importance * weights, group)


def _largest_first(factors: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes up to `top`, which the largest of the block gets, and the super-factor."""
    largest = np.maximum(factors.max(axis=1, keepdims=True), 0)
    inverse = quotient(np.full_like(largest, top), largest)
    return np.rint(inverse * factors).clip(0, top).astype(np.uint8), largest / F(top)


def _rounded_scales(scales: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales under a super-scale by which that of largest magnitude is -top; and the super-scale."""
    largest = signed_largest(np.ascontiguousarray(scales.T))[:, None]
    inverse = np.divide(F(-top), largest, out=np.zeros_like(largest), where=largest != 0)
    super_scale = np.divide(F(1), inverse, out=np.zeros_like(largest), where=largest != 0)
    return np.rint(inverse * scales), super_scale


def _codes_again(
    values: Values, step: np.ndarray, minimum: np.ndarray | None, codes: Values, low: int, high: int
) -> UInt8[np.ndarray, "blocks 256"]:
    """The codes, from 0 on, nearest to the values under what was stored; as they were where that is 0."""
    step = step.reshape(-1)
    shifted = values if minimum is None else values + minimum.reshape(-1)
    again = np.rint(shifted / step)
    again = np.fmax(np.fmin(again, F(high)), F(low)) - F(low)
    np.copyto(again, codes, where=step == 0)
    return blocked(again, BLOCK)


def _per_block(per_group: np.ndarray, count: int) -> np.ndarray:
    """[count, blocks] of one number a group."""
    return np.ascontiguousarray(per_group.reshape(-1, count).T)


def _stored(factor: np.ndarray) -> np.ndarray:
    return factor.astype(np.float32)


def _empty(rows: Rows, kind: GGMLType) -> np.ndarray:
    return np.empty(rows.size // BLOCK, FORMATS[kind].layout)


ENCODERS = {
    GGMLType.Q2_K: q2_k,
    GGMLType.Q3_K: q3_k,
    GGMLType.Q4_K: q4_k,
    GGMLType.Q5_K: q5_k,
    GGMLType.Q6_K: q6_k,
}
