"""The scale (and minimum) of each group whose rounded values lie nearest, by ggml's searches (ggml-quants.c).

Arrays of values are [n, G]: row i has value i of every group. Sums go from row to row in float32, which is
ggml's order for the values of a group, so what is found has ggml's own bits. Each search tries a few
scales, rounds, and solves for the scale that is best for these codes; the best of all tries stays.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

F = np.float32
ALL_ZERO = F(1e-15)  # groups of smaller magnitudes count as zeros
ROUNDS = 5  # of `refined`

Values = Float32[np.ndarray, "n G"]
PerGroup = Float32[np.ndarray, " G"]


class Tries(NamedTuple):
    """Which scales are tried: from (top + first) / range on, in so many steps; how errors are counted."""

    first: float
    step: float
    steps: int
    is_absolute: bool = False  # the sum of weighted magnitudes, else of weighted squares


def total(values: Values) -> PerGroup:
    """The sum of each group, added up from the first value to the last."""
    if values.shape[1] == 1:  # NumPy would sum a single column in pairs
        return np.add.accumulate(values, axis=0)[-1]
    return np.add.reduce(values, axis=0)


def rounded(values: Values, inverse: PerGroup, low: float, high: float) -> Values:
    """values * inverse as whole numbers from `low` to `high`."""
    codes = values * inverse
    np.rint(codes, out=codes)
    return np.clip(codes, F(low), F(high), out=codes)


def signed_largest(values: Values) -> PerGroup:
    """The value of largest magnitude of each group, the first of several; zeros have no sign."""
    place = np.abs(values).argmax(axis=0)[None]
    return np.take_along_axis(values, place, axis=0)[0] + F(0)


def quotient(
    numerator: Float32[np.ndarray, "*shape"], denominator: Float32[np.ndarray, "*shape"]
) -> Float32[np.ndarray, "*shape"]:
    """numerator / denominator; 0 where the denominator is not above 0."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def symmetric(values: Values, weights: Values, top: int) -> tuple[Values, PerGroup]:
    """Codes from 0 to 2 top - 1 that stand for (code - top) * scale, and the scale (make_qx_quants)."""
    largest = signed_largest(values)
    is_zero = np.abs(largest) < ALL_ZERO
    largest[is_zero] = 1
    weighted = weights * values

    def sums(inverse: PerGroup) -> tuple[PerGroup, PerGroup]:
        codes = rounded(values, inverse, -top, top - 1)
        squares = weights * codes
        squares *= codes
        codes *= weighted
        return total(codes), total(squares)

    best_inverse = F(-top) / largest
    sum_lx, sum_l2 = sums(best_inverse)
    scale = quotient(sum_lx, sum_l2)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        inverse = -(F(top) + F(0.1) * F(step)) / largest
        sum_lx, sum_l2 = sums(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        found = quotient(sum_lx, sum_l2)
        np.copyto(scale, found, where=better)
        np.copyto(best, found * sum_lx, where=better)
        np.copyto(best_inverse, inverse, where=better)
    codes = rounded(values, best_inverse, -top, top - 1)
    codes[:, is_zero] = -top
    scale[is_zero] = 0
    codes += F(top)
    return codes, scale


def refined_symmetric(values: Values, top: int) -> tuple[Values, PerGroup]:
    """As `symmetric` under the values' squares as weights, one try, then `refined` (make_q3_quants)."""
    largest = signed_largest(values)
    is_zero = np.abs(largest) < ALL_ZERO
    largest[is_zero] = 1
    codes = rounded(values, F(-top) / largest, -top, top - 1)
    scale = refined(values, values * values, codes, -top, top - 1)
    codes[:, is_zero] = -top
    scale[is_zero] = 0
    codes += F(top)
    return codes, scale


def refined(values: Values, weights: Values, codes: Values, low: float, high: float) -> PerGroup:
    """The best scale; `codes` have moved, one after another, to where that is best given all others."""
    weighted = weights * values
    sum_lx, sum_l2 = total(weighted * codes), total(weights * codes * codes)
    for _ in range(ROUNDS):
        has_changed = False
        for value, weight, product, code in zip(values, weights, weighted, codes, strict=True):
            other_lx, other_l2 = sum_lx - product * code, sum_l2 - weight * code * code
            new = np.clip(np.rint(value * other_l2 / other_lx), F(low), F(high))
            new_lx, new_l2 = other_lx + product * new, other_l2 + weight * new * new
            better = (other_lx > 0) & (other_l2 > 0) & (new != code)
            better &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            if better.any():
                has_changed = True
                for target, source in ((code, new), (sum_lx, new_lx), (sum_l2, new_l2)):
                    np.copyto(target, source, where=better)
        if not has_changed:
            break
    return quotient(sum_lx, sum_l2)


def positive(values: Values, weights: Values, top: int) -> tuple[Values, PerGroup]:
    """Codes from 0 to top of values that are not negative, and their scale (make_qp_quants)."""
    largest = np.maximum(values.max(axis=0), 0)
    is_zero = largest < ALL_ZERO
    largest[is_zero] = 1

    def error(inverse: PerGroup) -> PerGroup:
        off = values - (1 / inverse) * rounded(values, inverse, 0, top)
        return total(weights * off * off)

    best_inverse = F(top) / largest
    best = error(best_inverse)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        inverse = (F(0.1) * F(step) + F(top)) / largest
        found = error(inverse)
        better = found < best
        np.copyto(best, found, where=better)
        np.copyto(best_inverse, inverse, where=better)
    codes = rounded(values, best_inverse, 0, top)
    scale = refined(values, weights, codes, 0, top)
    codes[:, is_zero] = 0
    scale[is_zero] = 0
    return codes, scale


def affine(values: Values, weights: Values, top: int, tries: Tries) -> tuple[Values, PerGroup, PerGroup]:
    """Codes from 0 to top that stand for code * scale - minimum, the scale, and the minimum, not negative
    (make_qkx2_quants, make_qkx3_quants)."""
    base, high = np.minimum(values.min(axis=0), 0), values.max(axis=0)
    is_flat = high <= base
    flat_base = base.copy()
    high[is_flat] = base[is_flat] + 1
    sum_w, sum_x = total(weights), total(weights * values)

    def error(codes: Values, scale: PerGroup, base: PerGroup) -> PerGroup:
        off = codes * scale
        off += base
        off -= values
        np.abs(off, out=off) if tries.is_absolute else np.multiply(off, off, out=off)
        off *= weights
        return total(off)

    inverse = F(top) / (high - base)
    scale = 1 / inverse
    best_inverse, best_base = inverse, base.copy()
    best = error(rounded(values - base, inverse, 0, top), scale, base)
    for step in _steps(tries, top):
        inverse = step / (high - base)  # the base is the best one so far
        codes = rounded(values - base, inverse, 0, top)
        new_scale, new_base, is_solved = _solved(values, weights, codes, sum_w, sum_x)
        found = error(codes, new_scale, new_base)
        better = is_solved & (found < best)
        pairs = (
            (best, found),
            (scale, new_scale),
            (best_inverse, inverse),
            (best_base, base),
            (base, new_base),
        )
        for target, source in pairs:
            np.copyto(target, source, where=better)
    codes = rounded(values - best_base, best_inverse, 0, top)
    codes[:, is_flat] = 0
    scale[is_flat] = 0
    base[is_flat] = flat_base[is_flat]
    return codes, scale, -base


def _steps(tries: Tries, top: int) -> Iterable[np.float32]:
    return (F(tries.first) + F(tries.step) * F(i) + F(top) for i in range(tries.steps + 1))


def _solved(
    values: Values, weights: Values, codes: Values, sum_w: PerGroup, sum_x: PerGroup
) -> tuple[PerGroup, PerGroup, np.ndarray]:
    """The scale and base of least squares for these codes, the base not above 0; and where there are such."""
    products = weights * codes
    sum_l = total(products)
    sum_xl = total(products * values)
    products *= codes
    sum_l2 = total(products)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    base = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    is_above = base > 0
    np.copyto(scale, sum_xl / sum_l2, where=is_above)
    base[is_above] = 0
    return scale, base, determinant > 0
