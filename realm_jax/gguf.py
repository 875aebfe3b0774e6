"""The GGUF container: the metadata and the tensor index of a model file, read from a memory map.

Layout, little endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF", version u32, number of tensors u64, number of keys u64
    each key:     name string, value type u32, value
    each tensor:  name string, n_dims u32, dims u64 (innermost first), ggml type u32, offset u64
    padding to `general.alignment`, then the data; offsets count from its start

A string is a u64 length and that many bytes. The file is hostile until read: a number from it stays a
Python int, and is held against the bytes that are left before anything is allocated or repeated.
"""

import mmap
import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import UInt8

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import BLOCK_SIZES, GGMLType

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_ALIGNMENT = 2**31

U32, U64 = np.dtype("<u4"), np.dtype("<u8")
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: U32,
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    BOOL: np.dtype("<u1"),
    10: U64,
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
LENGTH = struct.Struct("<Q")

# The least bytes that an item can take: bounds a count before the first item is read.
MIN_STRING = LENGTH.size
MIN_KEY = MIN_STRING + U32.itemsize + 1
MIN_TENSOR = MIN_STRING + 2 * U32.itemsize + 2 * U64.itemsize

# Vocabularies may hold pieces of characters; their bytes survive as surrogates.
RAW_TEXT_KEYS = "tokenizer.ggml."
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor index. `shape` is in NumPy order: a projection is (out, in)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    nbytes: int
    offset: int  # in bytes from the start of its file
    part: int = 0  # index into `GGUFFile.split_paths`


@dataclass(frozen=True, slots=True)
class Part:
    """One file on disk, read and checked."""

    path: Path
    map: mmap.mmap
    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


class GGUFFile:
    """An open model: `metadata`, `tensors` in file order, and the bytes of each tensor.

    Numbers of the metadata are Python scalars, string arrays lists, other arrays NumPy arrays. Text is
    UTF-8; in arrays under `tokenizer.ggml.` other bytes are kept by `surrogateescape`. Use as a context
    manager, or `close()`.
    """

    def __init__(self, path: Path, parts: Sequence[Part]) -> None:
        self.path = path
        self.version: int = parts[0].version
        self.metadata: dict[str, Any] = parts[0].metadata
        self.tensors: dict[str, TensorInfo] = _index(parts)
        self.split_paths: list[Path] = [part.path for part in parts]
        self.nbytes: int = sum(len(part.map) for part in parts)
        self._maps = [part.map for part in parts]

    def data(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        """The tensor's bytes as they lie in the file: a read-only view of the map, not a copy."""
        info = self.tensors[name]
        return np.frombuffer(self._maps[info.part], np.uint8, info.nbytes, info.offset)

    def close(self) -> None:
        """Give the maps back; a map with a view still in use goes with its last view."""
        for map in self._maps:
            with suppress(BufferError):
                map.close()

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open(path: str | PathLike[str]) -> GGUFFile:
    """The model at `path`, complete: any part of a split model opens all of its parts.

    Raises:
        ModelFileError: the file is missing or broken; the message names the field and its value.
        UnsupportedError: the file is big endian.
    """
    path = Path(path)
    opened = _read_part(path)
    count = _integer(opened.path, opened.metadata, "split.count", 1, at_least=1)
    if count == 1:
        return GGUFFile(path, [opened])
    siblings = _part_paths(opened, count)
    parts = [opened if sibling == path else _read_part(sibling) for sibling in siblings]
    for number, part in enumerate(parts):
        for key, expected in (("split.count", count), ("split.no", number)):
            if (value := _integer(part.path, part.metadata, key, -1, at_least=0)) != expected:
                _fail(part.path, f"{key} is {value}; expected {expected}")
    return GGUFFile(path, parts)


def _part_paths(opened: Part, count: int) -> list[Path]:
    """The paths of all parts of a split model, which exist; the file's own name gives theirs."""
    match = PART_NAME.fullmatch(opened.path.name)
    if match is None or int(match["count"]) != count:
        _fail(opened.path, f"split.count is {count}; so the name has to end in -NNNNN-of-{count:05}.gguf")
    folder, stem = opened.path.parent, match["stem"]
    paths = [folder / f"{stem}-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        _fail(opened.path, f"split.count is {count}; missing beside it: {', '.join(missing[:3])}{more}")
    return paths


def _index(parts: Sequence[Part]) -> dict[str, TensorInfo]:
    """All tensors by name, from all parts."""
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for info in part.tensors:
            if info.name in tensors:
                _fail(part.path, f"tensor {_shown(info.name)} stands twice in the index")
            tensors[info.name] = replace(info, part=number)
    first = parts[0]
    expected = _integer(first.path, first.metadata, "split.tensors.count", len(tensors), at_least=0)
    if expected != len(tensors):
        _fail(first.path, f"split.tensors.count is {expected}; the parts hold {len(tensors)} tensors")
    return tensors


def _read_part(path: Path) -> Part:
    """One file, mapped, with its header, metadata and tensor index read and checked."""
    if not path.is_file():
        raise ModelFileError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            if (size := file.seek(0, 2)) == 0:
                _fail(path, "the file is empty")
            map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    reader = _Reader(path, map)
    version = reader.version()
    tensor_count = reader.count("number of tensors", MIN_TENSOR)
    key_count = reader.count("number of keys", MIN_KEY)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string("a metadata key")
        if key in metadata:
            reader.fail(f"key {_shown(key)} stands twice in the metadata")
        metadata[key] = reader.value(key)
    if tensor_count * MIN_TENSOR > reader.left:
        reader.fail(f"number of tensors is {tensor_count}; the {reader.left} bytes left cannot hold as many")
    alignment = _alignment(path, metadata)
    tensors = [reader.tensor(alignment) for _ in range(tensor_count)]
    start = -(-reader.position // alignment) * alignment
    tensors = [replace(info, offset=start + info.offset) for info in tensors]
    _check_placement(path, tensors, size)
    return Part(path, map, version, metadata, tensors)


def _check_placement(path: Path, tensors: Sequence[TensorInfo], size: int) -> None:
    """Every tensor lies inside the file, and no two of them overlap."""
    end, before = 0, ""
    for info in sorted(tensors, key=lambda info: info.offset):
        if info.offset < end:
            _fail(path, f"tensor {_shown(info.name)}: offset {info.offset} is inside tensor {_shown(before)}")
        end, before = info.offset + info.nbytes, info.name
        if end > size:
            _fail(
                path,
                f"tensor {_shown(info.name)}: {info.nbytes} bytes at offset {info.offset} end beyond "
                f"the file's {size} bytes (if it was cut short, download it again)",
            )


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = _integer(path, metadata, "general.alignment", DEFAULT_ALIGNMENT, at_least=1)
    if alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
        _fail(path, f"general.alignment is {alignment}; it has to be a power of two up to 2^31")
    return alignment


def _integer(path: Path, metadata: dict[str, Any], key: str, default: int, at_least: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or value < at_least:
        _fail(path, f"{key} is {_shown(value)}; it has to be an integer of at least {at_least}")
    return value


def _fail(path: Path, message: str) -> NoReturn:
    raise ModelFileError(f"{path.name}: {message}")


def _shown(value: object) -> str:
    """`value` for an error message: on one line, and short."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:60]}...({len(text)} characters)"


class _Reader:
    """Reads the header from front to back; nothing is read past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def fail(self, message: str) -> NoReturn:
        _fail(self.path, message)

    def take(self, nbytes: int, what: str) -> int:
        """The position of the next `nbytes` bytes, which are then behind the reader."""
        if nbytes > self.left:
            self.fail(f"{what} takes {nbytes} bytes; {self.left} are left at byte {self.position}")
        self.position += nbytes
        return self.position - nbytes

    def numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        start = self.take(count * dtype.itemsize, what)
        return np.frombuffer(self.data, dtype, count, start).copy()

    def integer(self, dtype: np.dtype, what: str) -> int:
        return int(self.numbers(dtype, 1, what)[0])

    def count(self, what: str, least: int) -> int:
        """A number of items of at least `least` bytes each: as many as the rest of the file can hold."""
        count = self.integer(U64, what)
        if count * least > self.left:
            self.fail(f"{what} is {count}; the {self.left} bytes left cannot hold as many")
        return count

    def version(self) -> int:
        magic = self.data[self.take(4, "magic") : self.position]
        if magic != b"GGUF":
            self.fail(f"magic is {magic!r}; a GGUF file begins with b'GGUF'")
        version = self.integer(U32, "version")
        if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
            raise UnsupportedError(
                f"{self.path.name}: version is {version:#x}, a big-endian file; only little-endian files are "
                "served (convert it with gguf_convert_endian.py of gguf-py)"
            )
        if version not in VERSIONS:
            self.fail(f"version is {version}; versions 2 and 3 are read (convert the model again)")
        return version

    def string(self, what: str) -> str:
        return self.strings(1, what, "strict")[0]

    def strings(self, count: int, what: str, errors: str) -> list[str]:
        """The next `count` strings: one tight loop, since a vocabulary has hundreds of thousands."""
        data, size, position, unpack = self.data, len(self.data), self.position, LENGTH.unpack_from
        texts: list[str] = []
        try:
            for _ in range(count):
                start = position + MIN_STRING
                if start > size:
                    self.fail(f"{what}: the file ends in string {len(texts)} of {count}")
                (length,) = unpack(data, position)
                position = start + length
                if position > size:
                    self.fail(f"{what}: string length is {length}; {size - start} bytes are left")
                texts.append(data[start:position].decode("utf-8", errors))
        except UnicodeDecodeError as error:
            self.fail(f"{what}: string {_shown(error.object)} is not UTF-8")
        self.position = position
        return texts

    def value(self, key: str) -> Any:
        """One metadata value as a Python scalar, a list of strings or a NumPy array."""
        what = f"key {_shown(key)}"
        kind = self.integer(U32, f"{what}: value type")
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(key, what)
        values = self.typed_numbers(kind, 1, what)
        return values[0].item()

    def array(self, key: str, what: str) -> list[str] | np.ndarray:
        kind = self.integer(U32, f"{what}: array element type")
        if kind == ARRAY:
            self.fail(f"{what}: an array of arrays (element type {kind}) is not supported")
        if kind == STRING:
            errors = "surrogateescape" if key.startswith(RAW_TEXT_KEYS) else "strict"
            return self.strings(self.count(f"{what}: array length", MIN_STRING), what, errors)
        if kind not in NUMBERS:
            self.fail(f"{what}: unknown array element type {kind}")
        return self.typed_numbers(kind, self.count(f"{what}: array length", NUMBERS[kind].itemsize), what)

    def typed_numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in NUMBERS:
            self.fail(f"{what}: unknown value type {kind}")
        values = self.numbers(NUMBERS[kind], count, what)
        if kind != BOOL:
            return values
        if (values > 1).any():
            self.fail(f"{what}: bool is {values.max()}; it has to be 0 or 1")
        return values.astype(np.bool_)

    def tensor(self, alignment: int) -> TensorInfo:
        """The next entry of the tensor index, its offset still relative to the data's start."""
        name = self.string("a tensor name")
        what = f"tensor {_shown(name)}"
        n_dims = self.integer(U32, f"{what}: n_dims")
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"{what}: n_dims is {n_dims}; it has to be 1 to {MAX_DIMS}")
        shape = tuple(self.numbers(U64, n_dims, f"{what}: dims").tolist()[::-1])
        if 0 in shape:
            self.fail(f"{what}: shape is {shape}; a dimension is 0")
        kind = self.integer(U32, f"{what}: ggml type")
        if kind not in BLOCK_SIZES:
            self.fail(f"{what}: unknown ggml type {kind}")
        block = BLOCK_SIZES[GGMLType(kind)]
        if shape[-1] % block.elements:
            self.fail(f"{what}: rows of {shape[-1]} are no multiple of the {block.elements} of a "
                      f"{GGMLType(kind).name} block")  # fmt: skip
        offset = self.integer(U64, f"{what}: offset")
        if offset % alignment:
            self.fail(f"{what}: offset {offset} is not a multiple of the alignment {alignment}")
        return TensorInfo(name, shape, GGMLType(kind), prod(shape) // block.elements * block.nbytes, offset)
