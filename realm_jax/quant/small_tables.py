"""Types whose codes index a fixed table of up to 16 values: one bit, ternary, FP4, IQ4 (ggml-quants.c)."""

import numpy as np

from realm_jax.ggml import GGMLType
from realm_jax.quant.formats import BlockFormat, Parts, planes

SCALE = ("d", "<f2", (1,))

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled, to be integers
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
TERNARY = (-1, 0, 1)

# Half of what the scale byte stands for, because the values of E2M1 are doubled.
E8M0 = np.ldexp(np.float32(0.5), np.arange(256) - 127)


def _ue4m3() -> np.ndarray:
    """The unsigned FP8 scales of NVFP4, halved as well; 0x7F, its NaN, counts as 0 in ggml."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    normal = np.ldexp(np.float32(8) + mantissa.astype(np.float32), exponent - 11)
    values = np.where(exponent == 0, np.ldexp(mantissa.astype(np.float32), -10), normal)
    values[0x7F] = 0
    return values.astype(np.float16)  # which holds all of them exactly


UE4M3 = _ue4m3()


def q1_0(blocks: np.ndarray) -> Parts:
    return Parts(np.unpackbits(blocks["qs"], axis=1, bitorder="little"), blocks["d"])


def q2_0(blocks: np.ndarray) -> Parts:
    return Parts(planes(blocks["qs"], run=1, width=2), blocks["d"])


def digits(packed: np.ndarray, count: int) -> np.ndarray:
    """The first `count` ternary digits of each byte, a fraction in base 3: all the first, then the second."""
    powers = 3 ** np.arange(count, dtype=np.uint8)
    shifted = packed[:, None] * powers[None, :, None]
    return (shifted * np.uint16(3) >> 8).astype(np.uint8).reshape(len(packed), -1)


def tq1_0(blocks: np.ndarray) -> Parts:
    qs = blocks["qs"]
    codes = [digits(qs[:, :32], 5), digits(qs[:, 32:], 5), digits(blocks["qh"], 4)]
    return Parts(np.hstack(codes), blocks["d"])


def tq2_0(blocks: np.ndarray) -> Parts:
    return Parts(planes(blocks["qs"], run=32, width=2), blocks["d"])


def mxfp4(blocks: np.ndarray) -> Parts:
    return Parts(planes(blocks["qs"], run=16, width=4), E8M0[blocks["e"]])


def nvfp4(blocks: np.ndarray) -> Parts:
    return Parts(planes(blocks["qs"], run=8, width=4), UE4M3[blocks["d"]])


def iq4_nl(blocks: np.ndarray) -> Parts:
    return Parts(planes(blocks["qs"], run=16, width=4), blocks["d"])


def iq4_xs(blocks: np.ndarray) -> Parts:
    low, high = planes(blocks["scales_l"], run=1, width=4), planes(blocks["scales_h"], run=1, width=2)
    scales = (high << 4 | low).view(np.int8) - np.int8(32)
    return Parts(planes(blocks["qs"], run=16, width=4), blocks["d"], scales)


FORMATS = {
    GGMLType.Q1_0: BlockFormat(128, np.dtype([SCALE, ("qs", "u1", 16)]), q1_0, table=(-1, 1)),
    GGMLType.Q2_0: BlockFormat(64, np.dtype([SCALE, ("qs", "u1", 16)]), q2_0, table=(-1, 0, 1, 2)),
    GGMLType.TQ1_0: BlockFormat(
        256, np.dtype([("qs", "u1", 48), ("qh", "u1", 4), SCALE]), tq1_0, table=TERNARY
    ),
    GGMLType.TQ2_0: BlockFormat(256, np.dtype([("qs", "u1", 64), SCALE]), tq2_0, table=(*TERNARY, 2)),
    GGMLType.MXFP4: BlockFormat(32, np.dtype([("e", "u1", (1,)), ("qs", "u1", 16)]), mxfp4, table=E2M1),
    GGMLType.NVFP4: BlockFormat(64, np.dtype([("d", "u1", 4), ("qs", "u1", 32)]), nvfp4, table=E2M1),
    GGMLType.IQ4_NL: BlockFormat(32, np.dtype([SCALE, ("qs", "u1", 16)]), iq4_nl, table=IQ4),
    GGMLType.IQ4_XS: BlockFormat(
        256,
        np.dtype([SCALE, ("scales_h", "u1", 2), ("scales_l", "u1", 4), ("qs", "u1", 128)]),
        iq4_xs,
        table=IQ4,
    ),
}
