"""Quantized weights in 32-bit words: the layout that the GPU and TPU kernels multiply by.

An array [units, height, O]: outputs stand side by side, so that a row of words is one load, and one scale
serves many rows. A unit is so many inputs, one record of rows:

- codes: runs of 16 or 32 inputs. A tile of as many rows as a run has inputs holds 8 runs of four bits, or 4
  of eight, one run in each field of its words: a shift and a mask give a whole run, no lane is moved.
- super-scales, then super-minima: two float16 a word, or a float32.
- what multiplies these, four bytes a word, each 128 more than its value.

    weight = (super_scale * group_scale) * (code - offset) + super_minimum * group_minimum

I inputs, O outputs; inputs past the last are weights of zero.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

MIDDLE = 128
"""What is added to signed bytes to make them unsigned."""
LEAST_UNIT = 128
"""A TPU reads inputs in vectors of so many."""

_TWO_23 = 0x4B000000  # the float32 2^23: its last bits count in ones
_HALF_BIAS = 112 << 23  # what the exponent of a float32 is more than that of a float16
_HALF_INFINITE = 0x7C00
_HALF_NORMAL = 0x0400


@dataclass(frozen=True)
class WordFormat:
    """What the record of a unit is made of."""

    inputs: int
    run: int  # inputs of a field: 16 or 32
    group: int  # inputs that share a scale
    super_group: int  # inputs that share a super-scale
    bits: int  # of a code: 4 or 8
    table: tuple[int, ...]  # the 16 values that 4-bit codes stand for; empty: they are the codes less offset
    offset: int
    factor: str  # dtype of super-scales and -minima: float16 or float32
    has_bytes: bool
    has_minimum: bool

    @property
    def fields(self) -> int:
        """Codes of a word."""
        return 32 // self.bits

    @property
    def unit(self) -> int:
        """Inputs of a record."""
        return max(self.super_group, self.run * self.fields, LEAST_UNIT)

    @property
    def units(self) -> int:
        return -(-self.inputs // self.unit)

    @property
    def padded(self) -> int:
        """Inputs, those that fill the last unit included."""
        return self.units * self.unit

    @property
    def parts(self) -> tuple[int, int, int]:
        """Rows of a record: codes, super-factors, bytes."""
        kinds = 1 + self.has_minimum
        supers = self.unit // self.super_group * kinds
        group_bytes = self.unit // self.group * kinds if self.has_bytes else 0
        per_word = 2 if self.factor == "float16" else 1
        return self.unit // self.fields, -(-supers // per_word), -(-group_bytes // 4)

    @property
    def height(self) -> int:
        """Rows of a record."""
        return sum(self.parts)


def unit_weights(
    form: WordFormat, words: Callable[[int, int], Array]
) -> Iterator[tuple[int, Float32[Array, "*units run n"]]]:
    """The weights of a unit, run by run, each with its first input; exact, a kernel's registers suffice.

    words(first, count): these rows of the record, int32 [*units, count, n]; asked for once each.
    """
    row = functools.cache(lambda index: words(index, 1))
    for tile in range(form.unit // (form.run * form.fields)):
        codes = words(tile * form.run, form.run)
        for field in range(form.fields):
            start = (tile * form.fields + field) * form.run
            values = _values(codes, field * form.bits, form) * _factor(row, form, start, 0)
            yield start, values + _factor(row, form, start, 1) if form.has_minimum else values


def _values(words: Int32[Array, "*shape"], shift: int, form: WordFormat) -> Float32[Array, "*shape"]:
    if form.table:
        return _looked_up(words >> shift, form.table)
    return _unsigned(words >> shift, form.bits, form.offset)


def _factor(row: Callable[[int], Array], form: WordFormat, start: int, kind: int) -> Float32[Array, "*shape"]:
    """The scale (kind 0) or minimum (kind 1) of a run."""
    codes, supers, _ = form.parts
    index = start // form.super_group + kind * (form.unit // form.super_group)
    if form.factor == "float16":
        factor = _half(row(codes + index // 2) >> (16 * (index % 2)) & 0xFFFF)
    else:
        factor = jax.lax.bitcast_convert_type(row(codes + index), jnp.float32)
    if not form.has_bytes:
        return factor
    index = start // form.group + kind * (form.unit // form.group)
    return factor * _unsigned(row(codes + supers + index // 4) >> (8 * (index % 4)), 8, MIDDLE)


def _unsigned(words: Int32[Array, "*shape"], bits: int, offset: int) -> Float32[Array, "*shape"]:
    """The lowest bits as a number, less the offset: as the last bits of 2^23, so without conversion."""
    number = (words & ((1 << bits) - 1)) | _TWO_23
    return jax.lax.bitcast_convert_type(number, jnp.float32) - float((1 << 23) + offset)


def _looked_up(words: Int32[Array, "*shape"], table: tuple[int, ...]) -> Float32[Array, "*shape"]:
    """What the table holds at the lowest four bits: a tree of selections, whose every leaf is a constant."""
    branches: list[Array] = [jnp.full(words.shape, value, jnp.float32) for value in table]
    for bit in range(4):
        is_set = (words >> bit & 1) == 1
        branches = [
            jnp.where(is_set, high, low) for low, high in zip(branches[::2], branches[1::2], strict=True)
        ]
    return branches[0]


def _half(bits: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """The float16 with these bits. By integers: TPUs have no such type, and XLA may make subnormals zero."""
    size = bits & 0x7FFF
    exponent = jnp.where(size >= _HALF_INFINITE, 2 * _HALF_BIAS, _HALF_BIAS)
    normal = jax.lax.bitcast_convert_type((size << 13) + exponent, jnp.float32)
    value = jnp.where(size < _HALF_NORMAL, _unsigned(size, 15, 0) * 2.0**-24, normal)
    return jnp.where(bits >= 0x8000, -value, value)


def dequantize_words(words: Int32[Array, "units height n"], form: WordFormat) -> Float32[Array, "I n"]:
    """The weights, a column for each output."""
    runs = [run for _, run in unit_weights(form, lambda first, count: words[:, first : first + count])]
    return jnp.concatenate(runs, axis=1).reshape(form.padded, -1)[: form.inputs]


def word_rows(
    words: Int32[Array, "units height O"], form: WordFormat, ids: Int[Array, "*lead"]
) -> Float[Array, "*lead I"]:
    """The weights of some outputs in float32: what an embedding looks up."""
    columns = dequantize_words(words[:, :, ids.reshape(-1)], form)
    return columns.T.reshape(*ids.shape, form.inputs)
