"""Reads what stands before the data of a GGUF file: the numbers, texts, values and entries of its header.

Layout, little endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md):

    "GGUF", version u32, number of tensors u64, number of keys u64
    each key:     name string, value type u32, value
    each tensor:  name string, n_dims u32, dims u64 (innermost first), ggml type u32, offset u64
    padding to `general.alignment`, then the data; offsets count from its start

A string is a u64 length and that many bytes. The file is hostile until read: a number from it stays a
Python int, and is held against the bytes that are left before anything is allocated or repeated.
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import BLOCK_SIZES, GGMLType

VERSIONS = (2, 3)
MAX_DIMS = 4

U32, U64 = np.dtype("<u4"), np.dtype("<u8")
BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {
    kind: np.dtype(f"<{code}") for kind, code in enumerate(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "u1"])
}
NUMBERS |= {10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8")}
LENGTH = struct.Struct("<Q")

# The least bytes that an item can take: bounds a count before the first item is read.
MIN_STRING = LENGTH.size
MIN_KEY = MIN_STRING + U32.itemsize + 1
MIN_TENSOR = MIN_STRING + 2 * U32.itemsize + 2 * U64.itemsize

# Vocabularies may hold pieces of characters; their bytes survive as surrogates.
RAW_TEXT_KEYS = "tokenizer.ggml."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor index. `shape` is in NumPy order: a projection is (out, in)."""

    name: str
    shape: tuple[int, ...]
    ggml_type: GGMLType
    nbytes: int
    offset: int  # in bytes from the start of its file
    part: int = 0  # index into `GGUFFile.split_paths`


def fail(path: Path, message: str) -> NoReturn:
    raise ModelFileError(f"{path.name}: {message}")


def shown(value: object) -> str:
    """`value` for an error message: on one line, and short."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 80 else f"{text[:60]}...({len(text)} characters)"


class HeaderReader:
    """Reads the header from front to back; nothing is read past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def fail(self, message: str) -> NoReturn:
        fail(self.path, message)

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
            self.fail(f"{what}: string {shown(error.object)} is not UTF-8")
        self.position = position
        return texts

    def value(self, key: str) -> Any:
        """One metadata value as a Python scalar, a list of strings or a NumPy array."""
        what = f"key {shown(key)}"
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
        what = f"tensor {shown(name)}"
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
            self.fail(
                f"{what}: rows of {shape[-1]} are no multiple of {GGMLType(kind).name}'s {block.elements}"
            )
        offset = self.integer(U64, f"{what}: offset")
        if offset % alignment:
            self.fail(f"{what}: offset {offset} is not a multiple of the alignment {alignment}")
        return TensorInfo(name, shape, GGMLType(kind), prod(shape) // block.elements * block.nbytes, offset)
