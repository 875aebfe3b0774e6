"""Importance matrices: the mean square of each input of each projection, in llama.cpp's files.

A file is a GGUF of `general.type` imatrix with, for each tensor, `NAME.in_sum2` [experts, inputs], the sums
of squares, and `NAME.counts` [experts, 1], how many rows they are of. Older files (.dat) are read too:

    number of entries i32
    each: length of the name i32, name, number of calls i32, number of values i32, means times calls f32
    number of chunks i32, length of the text's name i32, name
"""

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realm_jax import gguf
from realm_jax.errors import ModelFileError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.gguf.header import ARRAY, STRING, fail, shown

SUMS, COUNTS = ".in_sum2", ".counts"
I32 = np.dtype("<i4")


@dataclass(frozen=True, eq=False)
class Squares:
    """What was seen of a tensor's inputs. sums: float64 [experts, inputs]; counts: [experts] rows."""

    sums: np.ndarray
    counts: np.ndarray

    @property
    def unseen(self) -> int:
        """Experts that no row chose."""
        return int((self.counts == 0).sum())


@dataclass(frozen=True, eq=False)
class ImportanceMatrix:
    """The mean squares by tensor, experts one after another in float32; and where they are from."""

    path: Path
    means: Mapping[str, np.ndarray]
    chunks: int
    datasets: Sequence[str]

    def of(self, info: TensorInfo) -> np.ndarray | None:
        """The tensor's, [experts, inputs]; None where it has none.

        Raises ModelFileError where the size is another than the tensor's; an embedding's is then not used.
        """
        means = self.means.get(info.name)
        if means is None:
            return None
        *outer, columns = info.shape
        experts = outer[-2] if len(outer) > 1 else 1
        if means.size == experts * columns:
            return means.reshape(experts, -1)
        if info.name != "token_embd.weight":
            fail(
                self.path,
                f"{info.name} has {means.size:,} values; the tensor {list(info.shape)} needs "
                f"{experts * columns:,} (made for another model?)",
            )
        return None

    def metadata(self) -> dict[str, bytes]:
        """What a quantized file says of it."""
        found = {"quantize.imatrix.file": writer.text_value(writer.path_text(self.path))}
        if self.datasets:
            found["quantize.imatrix.dataset"] = writer.text_value(self.datasets[0])
        found["quantize.imatrix.entries_count"] = writer.count_value(len(self.means))
        if self.chunks:
            found["quantize.imatrix.chunks_count"] = writer.count_value(self.chunks)
        return found


def write(path: Path, squares: Mapping[str, Squares], *, chunks: int, chunk_size: int, dataset: str) -> None:
    """`path` holds the squares, as llama-imatrix writes them."""
    metadata = {
        "general.type": writer.text_value("imatrix"),
        "imatrix.datasets": struct.pack("<IIQ", ARRAY, STRING, 1) + writer.string(dataset),
        "imatrix.chunk_count": writer.count_value(chunks),
        "imatrix.chunk_size": writer.count_value(chunk_size),
    }
    plans, data = [], []
    for name, each in sorted(squares.items()):
        for suffix, values in ((SUMS, each.sums), (COUNTS, each.counts[:, None])):
            plans.append(writer.TensorPlan(name + suffix, values.shape, GGMLType.F32))
            data.append([values.astype("<f4").tobytes()])
    writer.write(path, metadata, plans, data)


def read(path: Path) -> ImportanceMatrix:
    """The importance matrix in the file, GGUF or older. Raises ModelFileError for a broken one."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    if not is_gguf:
        return _read_legacy(path)
    with gguf.open(path) as file:
        return _read_gguf(file)


def _read_gguf(file: GGUFFile) -> ImportanceMatrix:
    path, metadata = file.path, file.metadata
    if (kind := metadata.get("general.type")) != "imatrix":
        fail(
            path, f"general.type is {shown(kind)}; an importance matrix has 'imatrix' (made by realm imatrix)"
        )
    bases = {name.removesuffix(end) for name in file.tensors for end in (SUMS, COUNTS) if name.endswith(end)}
    if not bases:
        fail(path, "no tensor is called NAME.in_sum2; there is nothing in this importance matrix")
    datasets, chunks = metadata.get("imatrix.datasets", []), metadata.get("imatrix.chunk_count", 0)
    if not isinstance(datasets, list):
        fail(path, f"imatrix.datasets is {shown(datasets)}; it has to be a list of texts")
    if type(chunks) is not int or not 0 <= chunks < 1 << 32:
        fail(path, f"imatrix.chunk_count is {shown(chunks)}; it has to be a number of 32 bits")
    return ImportanceMatrix(path, {base: _means(file, base) for base in sorted(bases)}, chunks, datasets)


def _means(file: GGUFFile, name: str) -> np.ndarray:
    """Sums divided by counts; 1 for an expert that was never chosen, of which nothing is known."""
    arrays = []
    for full in (name + SUMS, name + COUNTS):
        info = file.tensors.get(full)
        if info is None:
            fail(file.path, f"tensor {shown(full)} is missing")
        if info.ggml_type is not GGMLType.F32:
            fail(file.path, f"tensor {shown(full)} is {info.ggml_type.name}; it has to be F32")
        arrays.append(file.data(full).view("<f4").astype(np.float32))
    sums, counts = arrays
    if sums.size % counts.size:
        fail(file.path, f"{shown(name)}: {sums.size:,} sums are no multiple of {counts.size:,} counts")
    _check_squares(file.path, name, sums)
    _check_squares(file.path, name + COUNTS, counts)
    rows = np.rint(counts)[:, None]
    means = np.ones((counts.size, sums.size // counts.size), np.float32)
    np.divide(sums.reshape(means.shape), rows, out=means, where=rows > 0)
    return means.reshape(-1)


def _check_squares(path: Path, name: str, values: np.ndarray) -> None:
    is_wrong = ~(np.isfinite(values) & (values >= 0))
    if is_wrong.any():
        fail(path, f"{shown(name)} holds {values[is_wrong][0]}; sums of squares are finite and not below 0")


def _read_legacy(path: Path) -> ImportanceMatrix:
    if path.stat().st_size < I32.itemsize:
        fail(path, "neither a GGUF file nor an older importance matrix")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _LegacyReader(path, data)
        count = reader.count("number of entries", least=1, size=3 * I32.itemsize)
        means: dict[str, np.ndarray] = {}
        for _ in range(count):
            name = reader.text("a name")
            calls = reader.number(f"{shown(name)}: number of calls")
            values = reader.floats(f"{shown(name)}: number of values")
            _check_squares(path, name, values)
            means[name] = values / np.float32(calls) if calls > 0 else values
        if not reader.left:
            return ImportanceMatrix(path, means, 0, [])
        chunks = reader.number("number of chunks")
        return ImportanceMatrix(path, means, max(0, chunks), [reader.text("the text's name")])


class _LegacyReader:
    """Reads an older file from front to back; a number is held against the bytes that are left."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, nbytes: int, what: str) -> int:
        if nbytes > self.left:
            fail(
                self.path,
                f"{what} takes {nbytes:,} bytes; {self.left:,} are left (neither a GGUF file nor an older "
                "importance matrix?)",
            )
        self.position += nbytes
        return self.position - nbytes

    def number(self, what: str) -> int:
        return int(np.frombuffer(self.data, I32, 1, self.take(I32.itemsize, what))[0])

    def count(self, what: str, *, least: int, size: int) -> int:
        """A number of items of at least `size` bytes."""
        count = self.number(what)
        if not least <= count <= self.left // size:
            fail(
                self.path,
                f"{what} is {count:,}; from {least} to {self.left // size:,} fit (neither a GGUF file nor an "
                "older importance matrix?)",
            )
        return count

    def text(self, what: str) -> str:
        length = self.count(f"length of {what}", least=0, size=1)
        start = self.take(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            fail(self.path, f"{what} at byte {start:,} is not UTF-8")

    def floats(self, what: str) -> np.ndarray:
        count = self.count(what, least=1, size=4)
        return np.frombuffer(self.data, "<f4", count, self.take(4 * count, what)).astype(np.float32)
