"""GGUF files written: metadata as bytes, so that what another file says can be kept; see `header`."""

import mmap
import os
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.gguf.header import ARRAY, BOOL, MIN_KEY, MIN_TENSOR, NUMBERS, STRING, HeaderReader

VERSION = 3
U32_KIND, F32_KIND = 4, 6
Chunk = bytes | memoryview


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that will be written. `shape` is in NumPy order."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType

    @property
    def nbytes(self) -> int:
        block = BLOCK_SIZES[self.ggml_type]
        return prod(self.shape) // block.elements * block.nbytes


def string(text: str) -> bytes:
    """A value of type string, without its type."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def text_value(text: str) -> bytes:
    return struct.pack("<I", STRING) + string(text)


def path_text(path: str | Path) -> str:
    """The path as a file can hold it: what is no UTF-8 in a name shows as a replacement character."""
    return os.fsencode(path).decode("utf-8", "replace")


def count_value(number: int) -> bytes:
    return struct.pack("<II", U32_KIND, number)


def real_value(number: float) -> bytes:
    return struct.pack("<If", F32_KIND, number)


def value(given: str | bool | int | float | Sequence[str] | np.ndarray) -> bytes:
    """Any value, with its type; lists are of strings, arrays of numbers. Whole numbers take 32 bits."""
    match given:
        case str():
            return text_value(given)
        case bool():
            return struct.pack("<I?", BOOL, given)
        case int():
            return count_value(given)
        case float():
            return real_value(given)
        case np.ndarray():
            kind = next(kind for kind, dtype in NUMBERS.items() if dtype == given.dtype)
            return struct.pack("<IIQ", ARRAY, kind, len(given)) + given.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(given)) + b"".join(map(string, given))


def raw_metadata(path: Path) -> dict[str, bytes]:
    """Each key's value, with its type before it, as the bytes of a file that `open` has checked."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = HeaderReader(path, data)
        reader.version()
        reader.count("number of tensors", MIN_TENSOR)
        found: dict[str, bytes] = {}
        for _ in range(reader.count("number of keys", MIN_KEY)):
            key = reader.string("a metadata key")
            start = reader.position
            reader.value(key)
            found[key] = data[start : reader.position]
        return found


def unsplit_metadata(path: Path) -> dict[str, bytes]:
    """As `raw_metadata`, without what only the parts of a split file say."""
    return {key: value for key, value in raw_metadata(path).items() if not key.startswith("split.")}


def write(
    path: Path,
    metadata: Mapping[str, bytes],
    tensors: Sequence[TensorPlan],
    data: Iterable[Iterable[Chunk]],
    *,
    alignment: int = 32,
) -> None:
    """`path` holds a complete GGUF file; until it is complete, it is not there.

    data: for each tensor its bytes, in chunks; read one after another, so only one need be in memory.
    """
    partial = path.parent / f"{path.name}.{os.getpid()}.partial"
    try:
        require_room(path, sum(plan.nbytes for plan in tensors))
        with partial.open("xb") as file:
            header = _header(metadata, tensors, alignment)
            _write_aligned(file, [header], alignment)
            for plan, chunks in zip(tensors, data, strict=True):
                written = _write_aligned(file, chunks, alignment)
                if written != plan.nbytes:
                    raise ValueError(f"{plan.name}: {written} bytes given, {plan.nbytes} planned")
            file.truncate()  # up to the last hole
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink()


def require_room(path: Path, nbytes: int) -> None:
    """So many bytes fit beside the path. Raises ModelFileError if not, OSError where there is no folder."""
    if (free := shutil.disk_usage(path.parent).free) < nbytes:
        raise ModelFileError(
            f"{path}: cannot be written: it takes {nbytes:,} bytes; {free:,} are free (make room, or give a "
            "path on another disk)"
        )


def _write_aligned(file: BinaryIO, chunks: Iterable[Chunk], alignment: int) -> int:
    """The chunks, and zeros up to the alignment, which take no memory however large it is; their size."""
    written = sum(file.write(chunk) for chunk in chunks)
    file.seek(_aligned(written, alignment) - written, os.SEEK_CUR)
    return written


def _header(metadata: Mapping[str, bytes], tensors: Sequence[TensorPlan], alignment: int) -> bytes:
    parts = [b"GGUF" + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [string(key) + value for key, value in metadata.items()]
    offset = 0
    for plan in tensors:
        dims = struct.pack(f"<I{len(plan.shape)}Q", len(plan.shape), *reversed(plan.shape))
        parts.append(string(plan.name) + dims + struct.pack("<IQ", plan.ggml_type, offset))
        offset += _aligned(plan.nbytes, alignment)
    return b"".join(parts)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
