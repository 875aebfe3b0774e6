"""Blocks of 32 values with one scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q8_1 (ggml-quants.c)."""

import numpy as np

from realm_jax.ggml import GGMLType
from realm_jax.quant.formats import NATURAL, BlockFormat, Parts, planes

SCALE = ("d", "<f2", (1,))
MINIMUM = ("m", "<f2", (1,))
NIBBLES = ("qs", "u1", 16)
FIFTH_BITS = ("qh", "u1", 4)
BYTES = ("qs", "i1", 32)


def nibbles(blocks: np.ndarray) -> np.ndarray:
    """Codes 0..15: values 0 to 15 in the low halves of the bytes, 16 to 31 in the high ones."""
    return planes(blocks["qs"], run=16, width=4)


def five_bits(blocks: np.ndarray) -> np.ndarray:
    """Codes 0..31: the nibbles, and bit i of `qh` on top of value i."""
    high = np.unpackbits(blocks["qh"], axis=1, bitorder="little")
    high <<= 4
    high |= nibbles(blocks)
    return high


def q4_0(blocks: np.ndarray) -> Parts:
    return Parts(nibbles(blocks), blocks["d"])


def q4_1(blocks: np.ndarray) -> Parts:
    return Parts(nibbles(blocks), blocks["d"], minimum=blocks["m"])


def q5_0(blocks: np.ndarray) -> Parts:
    return Parts(five_bits(blocks).view(np.int8) - np.int8(16), blocks["d"])


def q5_1(blocks: np.ndarray) -> Parts:
    return Parts(five_bits(blocks), blocks["d"], minimum=blocks["m"])


def q8(blocks: np.ndarray) -> Parts:
    return Parts(blocks["qs"], blocks["d"])


FORMATS = {
    GGMLType.Q4_0: BlockFormat(32, np.dtype([SCALE, NIBBLES]), q4_0, table=tuple(range(-8, 8))),
    GGMLType.Q4_1: BlockFormat(32, np.dtype([SCALE, MINIMUM, NIBBLES]), q4_1, table=NATURAL),
    GGMLType.Q5_0: BlockFormat(32, np.dtype([SCALE, FIFTH_BITS, NIBBLES]), q5_0),
    GGMLType.Q5_1: BlockFormat(32, np.dtype([SCALE, MINIMUM, FIFTH_BITS, NIBBLES]), q5_1),
    GGMLType.Q8_0: BlockFormat(32, np.dtype([SCALE, BYTES]), q8),
    # `s`, the sum of the values, serves ggml's dot products only.
    GGMLType.Q8_1: BlockFormat(32, np.dtype([SCALE, ("s", "<f2"), BYTES]), q8),
}
