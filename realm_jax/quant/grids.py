"""Types whose codes come in rows of 4 or 8 from a codebook: IQ1, IQ2 and IQ3 (ggml-quants.c).

A row's entries number magnitudes of the type's table, at most eight; bit 3 of a code says that the value is
negative (IQ2, IQ3) or that its delta is (IQ1). Group scales are the odd numbers 2 s + 1, and the power of
two that ggml multiplies them by is moved to the block's scale: all these products are exact in float32.
"""

from functools import cache

import numpy as np

from realm_jax.ggml import GGMLType
from realm_jax.quant.formats import BlockFormat, Parts, planes

SCALE = ("d", "<f2", (1,))
SEVEN_BITS = np.arange(128, dtype=np.uint8)
# Seven sign bits are stored; the eighth makes the number of negative values even.
EVEN_SIGNS = SEVEN_BITS | (np.bitwise_count(SEVEN_BITS) & 1) << 7

IQ2_TABLE = (8, 25, 43, 0, 0, 0, 0, 0, -8, -25, -43)
IQ3_XXS_TABLE = (4, 12, 20, 28, 36, 44, 52, 62, -4, -12, -20, -28, -36, -44, -52, -62)
IQ3_S_TABLE = (1, 3, 5, 7, 9, 11, 13, 15, -1, -3, -5, -7, -9, -11, -13, -15)
IQ1_TABLE = (-7, 1, 9, 0, 0, 0, 0, 0, -9, -1, 7)  # eight times -1, 0, 1 with a delta of 1/8 or -1/8


@cache
def codebook(name: str) -> np.ndarray:
    """The codebook's rows of numbered magnitudes, each row's bytes as one integer."""
    from gguf import quants  # 0.14 s, and data that only these types need

    source = getattr(quants, name)
    source.init_grid()
    numbered = np.searchsorted(source.grid_map, source.grid[0, 0]).astype(np.uint8)
    return numbered.view(f"<u{numbered.shape[1]}")[:, 0]


def rows(name: str, index: np.ndarray) -> np.ndarray:
    """The codebook's rows at `index` [n, R], joined: uint8 [n, R * row length]."""
    return np.take(codebook(name), index).view(np.uint8)


def flag(bits: np.ndarray) -> np.ndarray:
    """Bit 3 set where `bits`, 0 or 1, says so."""
    return bits << np.uint8(3)


def sign_flags(signs: np.ndarray) -> np.ndarray:
    """Bit 3 of the codes from eight signs a byte [n, R]."""
    return flag(np.unpackbits(signs, axis=1, bitorder="little"))


def odd(scales: np.ndarray) -> np.ndarray:
    return (2 * scales + 1).astype(np.uint8)


def scaled(blocks: np.ndarray, factor: float) -> np.ndarray:
    return blocks["d"].astype(np.float32) * np.float32(factor)


def packed_signs(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flags [n, 32 W] and group scales [n, W] from words [n, W]: four times 7 sign bits, 4 bits of scale."""
    signs = words[:, :, None] >> np.array([0, 7, 14, 21], np.uint32) & 127
    return sign_flags(EVEN_SIGNS[signs.reshape(len(words), -1)]), odd(words >> 28)


def iq2_xxs(blocks: np.ndarray) -> Parts:
    index = blocks["groups"]["index"].reshape(len(blocks), -1)
    flags, scales = packed_signs(blocks["groups"]["word"])
    return Parts(rows("IQ2_XXS", index) | flags, scaled(blocks, 1 / 8), scales)


def iq2_xs(blocks: np.ndarray) -> Parts:
    codes = rows("IQ2_XS", blocks["qs"] & 511) | sign_flags(EVEN_SIGNS[blocks["qs"] >> 9])
    return Parts(codes, scaled(blocks, 1 / 8), odd(planes(blocks["scales"], run=1, width=4)))


def iq2_s(blocks: np.ndarray) -> Parts:
    index = planes(blocks["qh"], run=1, width=2).astype(np.uint16) << 8 | blocks["qs"]
    codes = rows("IQ2_S", index) | sign_flags(blocks["signs"])
    return Parts(codes, scaled(blocks, 1 / 8), odd(planes(blocks["scales"], run=1, width=4)))


def iq3_xxs(blocks: np.ndarray) -> Parts:
    flags, scales = packed_signs(blocks["words"])
    return Parts(rows("IQ3_XXS", blocks["qs"]) | flags, scaled(blocks, 1 / 4), scales)


def iq3_s(blocks: np.ndarray) -> Parts:
    index = planes(blocks["qh"], run=1, width=1).astype(np.uint16) << 8 | blocks["qs"]
    codes = rows("IQ3_S", index) | sign_flags(blocks["signs"])
    return Parts(codes, blocks["d"], odd(planes(blocks["scales"], run=1, width=4)))


def iq1_s(blocks: np.ndarray) -> Parts:
    words = blocks["qh"]
    high = words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    index = high.reshape(len(blocks), -1) << 8 | blocks["qs"]
    deltas = np.repeat(flag((words >> 15).astype(np.uint8)), 32, axis=1)
    return Parts(rows("IQ1_S", index) | deltas, scaled(blocks, 1 / 8), odd(words >> 12 & 7))


def iq1_m(blocks: np.ndarray) -> Parts:
    high = planes(blocks["qh"], run=1, width=4)
    index = (high & 7).astype(np.uint16) << 8 | blocks["qs"]
    codes = rows("IQ1_M", index) | np.repeat(high & 8, 8, axis=1)
    words = blocks["scales"]
    # The float16 scale lies in the upper four bits of the four words, lowest bits first.
    pieces = words >> 12 << np.array([0, 4, 8, 12], np.uint16)
    scale = np.bitwise_or.reduce(pieces, axis=1, keepdims=True).view(np.float16)
    scales = words[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & 7
    return Parts(codes, scale.astype(np.float32) / 8, odd(scales.reshape(len(blocks), -1)))


FORMATS = {
    GGMLType.IQ2_XXS: BlockFormat(
        256,
        np.dtype([SCALE, ("groups", [("index", "u1", 4), ("word", "<u4")], 8)]),
        iq2_xxs,
        table=IQ2_TABLE,
    ),
    GGMLType.IQ2_XS: BlockFormat(
        256, np.dtype([SCALE, ("qs", "<u2", 32), ("scales", "u1", 8)]), iq2_xs, table=IQ2_TABLE
    ),
    GGMLType.IQ2_S: BlockFormat(
        256,
        np.dtype([SCALE, ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)]),
        iq2_s,
        table=IQ2_TABLE,
    ),
    GGMLType.IQ3_XXS: BlockFormat(
        256, np.dtype([SCALE, ("qs", "u1", 64), ("words", "<u4", 8)]), iq3_xxs, table=IQ3_XXS_TABLE
    ),
    GGMLType.IQ3_S: BlockFormat(
        256,
        np.dtype([SCALE, ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)]),
        iq3_s,
        table=IQ3_S_TABLE,
    ),
    GGMLType.IQ1_S: BlockFormat(
        256, np.dtype([SCALE, ("qs", "u1", 32), ("qh", "<u2", 8)]), iq1_s, table=IQ1_TABLE
    ),
    GGMLType.IQ1_M: BlockFormat(
        256, np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)]), iq1_m, table=IQ1_TABLE
    ),
}
