"""Containers -> words, in NumPy: the layout of `kernels.words`, made once when a model is loaded."""

import numpy as np
from jaxtyping import Int32, Shaped, UInt32

from realm_jax.kernels.words import MIDDLE, WordFormat
from realm_jax.quant.containers import Packed

RUNS = (32, 16)


def word_format(packed: Packed) -> WordFormat:
    """What its words are made of: runs of 32 inputs, or of 16 where scales or less padding ask for it."""
    table, offset = (), MIDDLE
    if packed.table is not None:
        offset = _linear_offset(packed.table)
        table = () if offset is not None else tuple(packed.table.tolist())
    forms = [
        WordFormat(
            inputs=packed.shape[-1],
            run=run,
            group=packed.group,
            super_group=packed.super_group,
            bits=8 if packed.table is None else 4,
            table=table,
            offset=offset or 0,
            factor=packed.super_scale.dtype.name,
            has_bytes=packed.group_scale is not None,
            has_minimum=packed.super_min is not None,
        )
        for run in RUNS
        if run <= packed.group
    ]
    return min(forms, key=lambda form: form.padded)


def _linear_offset(table: np.ndarray) -> int | None:
    """What a code is more than its value, if that is one number for all; zeros fill up a shorter table."""
    values = table.astype(int)
    used = values[: 16 - int((values[::-1] != 0).argmax())]
    return -int(used[0]) if len(used) and (np.diff(used) == 1).all() else None


def words(packed: Packed) -> Int32[np.ndarray, "units height O"]:
    """The weight `[out, in]` in words."""
    form = word_format(packed)
    parts = [_code_words(packed, form), _super_words((packed.super_scale, packed.super_min), form)]
    if form.has_bytes:
        parts.append(_byte_words((packed.group_scale, packed.group_min), form))
    return np.concatenate(parts, axis=1).view(np.int32)


def _code_words(packed: Packed, form: WordFormat) -> UInt32[np.ndarray, "units rows O"]:
    if packed.table is None:
        codes = packed.codes.view(np.uint8) ^ np.uint8(MIDDLE)
    else:
        codes = np.stack([packed.codes & 15, packed.codes >> 4], axis=-1).reshape(packed.shape)
    outputs = len(codes)
    fields = _filled(codes, form.padded).reshape(outputs, form.units, -1, form.fields, form.run)
    # outputs last: the fields of a word lie apart, each a plane of its own
    planes = np.ascontiguousarray(fields.transpose(3, 1, 2, 4, 0))
    return _joined(planes, form.bits).reshape(form.units, -1, outputs)


def _super_words(
    factors: tuple[np.ndarray | None, ...], form: WordFormat
) -> UInt32[np.ndarray, "units rows O"]:
    whole = _unit_rows(factors, form, form.super_group)
    return whole.view(np.uint32) if form.factor == "float32" else _grouped(whole.view(np.uint16))


def _byte_words(
    factors: tuple[np.ndarray | None, ...], form: WordFormat
) -> UInt32[np.ndarray, "units rows O"]:
    """Bytes that multiply are at most 127, and so int8 as they stand."""
    whole = _unit_rows(tuple(None if f is None else f.view(np.uint8) for f in factors), form, form.group)
    return _grouped(whole ^ np.uint8(MIDDLE))


def _unit_rows(
    factors: tuple[np.ndarray | None, ...], form: WordFormat, inputs: int
) -> Shaped[np.ndarray, "units _ O"]:
    """Those of a unit one below the other: all scales, then all minima."""
    rows = [_filled(f, form.padded // inputs).T for f in factors if f is not None]
    return np.concatenate([each.reshape(form.units, -1, each.shape[1]) for each in rows], axis=1)


def _grouped(rows: Shaped[np.ndarray, "units n O"]) -> UInt32[np.ndarray, "units words O"]:
    """Neighbouring rows as the fields of one word, the first lowest."""
    per_word = 4 // rows.itemsize
    missing = -rows.shape[1] % per_word
    rows = np.pad(rows, ((0, 0), (0, missing), (0, 0)))
    planes = rows.reshape(len(rows), -1, per_word, rows.shape[2])
    return _joined(planes.transpose(2, 0, 1, 3), 8 * rows.itemsize)


def _joined(planes: Shaped[np.ndarray, "fields *shape"], bits: int) -> UInt32[np.ndarray, "*shape"]:
    out = planes[0].astype(np.uint32)
    for index, plane in enumerate(planes[1:], 1):
        out |= plane.astype(np.uint32) << np.uint32(index * bits)
    return out


def _filled(rows: Shaped[np.ndarray, "O n"], columns: int) -> Shaped[np.ndarray, "O columns"]:
    """Zeros appended to each row."""
    return np.pad(rows, ((0, 0), (0, columns - rows.shape[1])))
