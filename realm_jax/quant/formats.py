"""What a GGML type is made of, and the one place where its factors are multiplied.

Every block format of GGML is a set of small integers under scales, and every one of them can be written

    value = (scale * group_scale) * code  +  (minimum * group_minimum)

with the products taken in float32 in this order, as ggml takes them. A format is therefore described by
`layout`, one block as it lies in the file, and `split`, which takes blocks apart into these factors; codes
of up to four bits are indices into a `table` of int8 values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Integer, UInt8

NATURAL = tuple(range(16))  # the table of formats whose 4-bit codes are the values


class Parts(NamedTuple):
    """The factors of n blocks of E values: S scales and G groups a block, in float16 or float32."""

    codes: Integer[np.ndarray, "n E"]
    scale: Float[np.ndarray, "n S"]
    group_scale: Integer[np.ndarray, "n G"] | None = None
    minimum: Float[np.ndarray, "n S"] | None = None
    group_minimum: Integer[np.ndarray, "n G"] | None = None

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> "Parts":
        """Every factor changed in the same way; what the format does not have stays None."""

        def changed(part: np.ndarray | None) -> np.ndarray | None:
            return None if part is None else change(part)

        optional = (self.group_scale, self.minimum, self.group_minimum)
        return Parts(change(self.codes), change(self.scale), *map(changed, optional))


@dataclass(frozen=True)
class CastFormat:
    """Plain numbers of one dtype."""

    dtype: np.dtype

    def fill(self, data: UInt8[np.ndarray, " bytes"], out: Float32[np.ndarray, " values"]) -> None:
        """Write the values of `data` to `out`."""
        np.copyto(out, data.view(self.dtype), casting="unsafe")


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of `elements` codes and their scales; `table` is given where codes are 4-bit indices."""

    elements: int
    layout: np.dtype
    split: Callable[[np.ndarray], Parts]
    table: tuple[int, ...] | None = None

    def parts(self, data: UInt8[np.ndarray, " bytes"]) -> Parts:
        """The factors of all blocks in `data`."""
        return self.split(data.view(self.layout))

    def fill(self, data: UInt8[np.ndarray, " bytes"], out: Float32[np.ndarray, " values"]) -> None:
        """Write the values of all blocks in `data` to `out`."""
        parts = self.parts(data)
        codes = parts.codes
        if self.table not in (None, NATURAL):
            codes = np.take(table_array(self.table), codes)
        step = product(parts.scale, parts.group_scale)
        groups = (*step.shape, out.size // step.size)
        out = out.reshape(groups)
        np.multiply(codes.reshape(groups), step[..., None], out=out)
        if parts.minimum is not None:
            out += product(parts.minimum, parts.group_minimum)[..., None]


Format = CastFormat | BlockFormat


def product(
    factor: Float[np.ndarray, "n S"], group_factor: Integer[np.ndarray, "n G"] | None
) -> Float32[np.ndarray, "n _"]:
    """The float32 scale (or minimum) of each group."""
    factor = factor.astype(np.float32)
    return factor if group_factor is None else factor * group_factor


def table_array(table: tuple[int, ...]) -> Integer[np.ndarray, "16"]:
    """The 16 int8 values that 4-bit codes index; entries past the table's end are 0."""
    return np.array(table + (0,) * (16 - len(table)), np.int8)


def planes(packed: UInt8[np.ndarray, "n bytes"], run: int, width: int) -> UInt8[np.ndarray, "n _"]:
    """The bit fields of `width` bits in `packed`, in GGML's order.

    Each run of `run` bytes holds 8 / width planes, one after another: first the lowest field of every byte,
    then the next one. With `run` 1 the fields follow each other as they stand in the byte.
    """
    count = 8 // width
    source = packed.reshape(len(packed), -1, run)
    fields = np.empty((len(packed), source.shape[1], count, run), np.uint8)
    for plane in range(count):
        np.right_shift(source, np.uint8(plane * width), out=fields[:, :, plane])
    fields &= np.uint8((1 << width) - 1)
    return fields.reshape(len(packed), -1)
