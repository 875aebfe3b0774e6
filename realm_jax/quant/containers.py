"""Every GGML block format without loss in one of two containers, so that two matmuls serve all of them.

The containers are 4-bit indices into a table of 16 int8 values, and int8 codes. Scales keep the format's own
factors: a super-scale of float16 (float32 where the format has no such, or where a power of two was moved
into it) times a byte per group; a minimum likewise. See `formats` for the order of the products.
"""

from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Float, Float32, Int8, Integer, UInt8

from realm_jax.ggml import BLOCK_SIZES
from realm_jax.quant import FORMATS, checked_type
from realm_jax.quant.chunks import for_each_chunk
from realm_jax.quant.formats import BlockFormat, CastFormat, Parts, table_array


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor `[..., in]`, all arrays with the same leading axes, usually `[out]` alone.

        value = (super_scale * group_scale) * code + (super_min * group_min)

    `codes` are int8 `[..., in]`; or, where `table` is given, uint8 `[..., in / 2]`, and the code is what the
    table holds at the byte's lower four bits for an even column, at its upper four for the odd one after it.
    A super-scale and -minimum serve `super_group` columns, a group scale and minimum `group` of them; where
    there are no group scales, the two sizes are equal.
    """

    codes: Int8[np.ndarray, "... I"] | UInt8[np.ndarray, "... I"]
    table: Int8[np.ndarray, "16"] | None
    super_scale: Float[np.ndarray, "... S"]
    group_scale: Integer[np.ndarray, "... G"] | None
    super_min: Float[np.ndarray, "... S"] | None
    group_min: Integer[np.ndarray, "... G"] | None
    group: int
    super_group: int

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, columns = self.codes.shape
        return (*lead, columns if self.table is None else 2 * columns)

    @property
    def nbytes(self) -> int:
        values = (getattr(self, field.name) for field in fields(self))
        return sum(value.nbytes for value in values if isinstance(value, np.ndarray))


def pack(data: UInt8[np.ndarray, "..."], ggml_type: int, shape: tuple[int, ...]) -> Packed | None:
    """The tensor in its container, exactly; None for plain numbers (F32, F16, BF16, F64, I8 to I64).

    Raises ModelFileError as `dequantize` does.
    """
    kind = checked_type(data, ggml_type, shape)
    form = FORMATS[kind]
    if isinstance(form, CastFormat):
        return None
    block = BLOCK_SIZES[kind]
    source = np.ascontiguousarray(data).reshape(-1, block.nbytes)
    # One block shows which factors the format has, and their sizes and dtypes.
    sample = _stored(form, np.zeros(block.nbytes, np.uint8))
    whole = sample.each(lambda part: np.empty((len(source), part.shape[1]), part.dtype))

    def pack_chunk(chunk: slice) -> None:
        for target, part in zip(whole, _stored(form, source[chunk].reshape(-1)), strict=True):
            if target is not None:
                target[chunk] = part

    for_each_chunk(pack_chunk, len(source), block.elements)
    blocks_per_row = shape[-1] // block.elements
    rows = whole.each(lambda part: part.reshape(*shape[:-1], blocks_per_row * part.shape[1]))
    super_group = block.elements // sample.scale.shape[1]
    return Packed(
        codes=rows.codes,
        table=None if form.table is None else table_array(form.table),
        super_scale=rows.scale,
        group_scale=rows.group_scale,
        super_min=rows.minimum,
        group_min=rows.group_minimum,
        group=super_group if sample.group_scale is None else block.elements // sample.group_scale.shape[1],
        super_group=super_group,
    )


def _stored(form: BlockFormat, data: UInt8[np.ndarray, " bytes"]) -> Parts:
    """The factors of the blocks, their codes as the container stores them."""
    parts = form.parts(data)
    if form.table is None:
        return parts._replace(codes=parts.codes.view(np.int8))  # unsigned codes are five bits: the same value
    # Two neighbours as one little-endian word: the even column's code in the lower byte.
    pairs = np.ascontiguousarray(parts.codes).view("<u2")
    return parts._replace(codes=(pairs | pairs >> 4).astype(np.uint8))


def unpack(packed: Packed) -> Float32[np.ndarray, "..."]:
    """The values, float32 `[..., in]`: what a matmul on the container has to multiply by."""
    codes = packed.codes
    if packed.table is not None:
        indices = np.stack([codes & 15, codes >> 4], axis=-1)
        codes = packed.table[indices].reshape(packed.shape)
    with np.errstate(all="ignore"):  # scales may be infinite or NaN
        values = codes * _columns(packed, packed.super_scale, packed.group_scale)
        if packed.super_min is not None:
            values += _columns(packed, packed.super_min, packed.group_min)
    return values


def _columns(packed: Packed, factor: np.ndarray, group_factor: np.ndarray | None) -> np.ndarray:
    """The product of the two factors, repeated for every column: float32 `[..., in]`."""
    columns = np.repeat(factor.astype(np.float32), packed.super_group, axis=-1)
    if group_factor is not None:
        columns *= np.repeat(group_factor, packed.group, axis=-1)
    return columns
