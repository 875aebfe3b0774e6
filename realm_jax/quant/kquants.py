"""Super-blocks of 256 values in groups of 16 or 32 with integer scales: Q2_K to Q8_K (ggml-quants.c)."""

import numpy as np

from realm_jax.ggml import GGMLType
from realm_jax.quant.formats import NATURAL, BlockFormat, Parts, planes

SCALE = ("d", "<f2", (1,))
MINIMUM = ("dmin", "<f2", (1,))


def q2_k(blocks: np.ndarray) -> Parts:
    codes = planes(blocks["qs"], run=32, width=2)
    packed = blocks["scales"]
    return Parts(codes, blocks["d"], packed & 15, -blocks["dmin"], packed >> 4)


def q3_k(blocks: np.ndarray) -> Parts:
    codes = planes(blocks["hmask"], run=32, width=1)
    codes <<= 2
    codes |= planes(blocks["qs"], run=32, width=2)
    packed = blocks["scales"]
    scales = planes(packed[:, 8:], run=4, width=2) << 4 | planes(packed[:, :8], run=8, width=4)
    return Parts(codes, blocks["d"], scales.view(np.int8) - np.int8(32))


def six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits from 12 bytes.

    Bytes 0-3 and 4-7 hold the first four of each; their upper two bits go on top of the last four, whose
    lower halves share bytes 8-11.
    """
    scales, minima, shared = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    last_scales = (shared & 15) | (scales >> 6 << 4)
    last_minima = (shared >> 4) | (minima >> 6 << 4)
    return np.hstack([scales & 63, last_scales]), np.hstack([minima & 63, last_minima])


def q4_k(blocks: np.ndarray) -> Parts:
    codes = planes(blocks["qs"], run=32, width=4)
    scales, minima = six_bit_scales(blocks["scales"])
    return Parts(codes, blocks["d"], scales, -blocks["dmin"], minima)


def q5_k(blocks: np.ndarray) -> Parts:
    codes = planes(blocks["qh"], run=32, width=1)
    codes <<= 4
    codes |= planes(blocks["qs"], run=32, width=4)
    scales, minima = six_bit_scales(blocks["scales"])
    return Parts(codes, blocks["d"], scales, -blocks["dmin"], minima)


def q6_k(blocks: np.ndarray) -> Parts:
    codes = planes(blocks["qh"], run=32, width=2)
    codes <<= 4
    codes |= planes(blocks["ql"], run=64, width=4)
    return Parts(codes.view(np.int8) - np.int8(32), blocks["d"], blocks["scales"])


def q8_k(blocks: np.ndarray) -> Parts:
    return Parts(blocks["qs"], blocks["d"])


FORMATS = {
    GGMLType.Q2_K: BlockFormat(
        256, np.dtype([("scales", "u1", 16), ("qs", "u1", 64), SCALE, MINIMUM]), q2_k, table=NATURAL
    ),
    GGMLType.Q3_K: BlockFormat(
        256,
        np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), SCALE]),
        q3_k,
        table=tuple(range(-4, 4)),
    ),
    GGMLType.Q4_K: BlockFormat(
        256, np.dtype([SCALE, MINIMUM, ("scales", "u1", 12), ("qs", "u1", 128)]), q4_k, table=NATURAL
    ),
    GGMLType.Q5_K: BlockFormat(
        256, np.dtype([SCALE, MINIMUM, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]), q5_k
    ),
    GGMLType.Q6_K: BlockFormat(
        256, np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), SCALE]), q6_k
    ),
    # `bsums`, the sums of groups of 16, serve ggml's dot products only.
    GGMLType.Q8_K: BlockFormat(
        256, np.dtype([("d", "<f4", (1,)), ("qs", "i1", 256), ("bsums", "<i2", 16)]), q8_k
    ),
}
