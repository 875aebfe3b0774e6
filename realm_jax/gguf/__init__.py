"""The GGUF container: a model's metadata and tensors from one file, or from the parts of a split one.

The files are mapped, not read; `header` has the layout and the checks of what stands in it.
"""

import mmap
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from realm_jax.errors import ModelFileError
from realm_jax.gguf.header import MIN_KEY, MIN_TENSOR, HeaderReader, TensorInfo, fail, shown

__all__ = ["GGUFFile", "TensorInfo", "open"]

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**31
PART_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Part:
    """One file on disk, read and checked."""

    path: Path
    map: mmap.mmap
    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


class GGUFFile(ABC):
    """An open model: `metadata`, `tensors` in file order, and the bytes of each tensor.

    Numbers of the metadata are Python scalars, string arrays lists, other arrays NumPy arrays. Text is
    UTF-8; in arrays under `tokenizer.ggml.` other bytes are kept by `surrogateescape`. Use as a context
    manager, or `close()`.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    split_paths: list[Path]
    nbytes: int

    @abstractmethod
    def data(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        """The tensor's bytes, read-only."""

    @abstractmethod
    def release(self, name: str) -> None:
        """The tensor's bytes no longer count as this process's memory; they may be read again."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the open model takes."""

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MappedFile(GGUFFile):
    """One file or several parts, mapped: bytes of tensors are views of the map, not copies."""

    def __init__(self, path: Path, parts: Sequence[Part]) -> None:
        self.path = path
        self.version = parts[0].version
        self.metadata = parts[0].metadata
        self.tensors = _index(parts)
        self.split_paths = [part.path for part in parts]
        self.nbytes = sum(len(part.map) for part in parts)
        self._maps = [part.map for part in parts]

    def data(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        info = self.tensors[name]
        return np.frombuffer(self._maps[info.part], np.uint8, info.nbytes, info.offset)

    def release(self, name: str) -> None:
        info = self.tensors[name]
        start = info.offset // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._maps[info.part].madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """A map with a view still in use goes with its last view."""
        for map in self._maps:
            with suppress(BufferError):
                map.close()


def open(path: str | PathLike[str]) -> GGUFFile:
    """The model at `path`, complete: any part of a split model opens all of its parts, a folder a checkpoint.

    Raises:
        ModelFileError: the file is missing or broken; the message names the field and its value.
        UnsupportedError: the file is big endian.
    """
    path = Path(path)
    if path.is_dir():
        from realm_jax.gguf.checkpoint import CheckpointFile

        return CheckpointFile(path)
    opened = _read_part(path)
    count = _integer(opened.path, opened.metadata, "split.count", 1, at_least=1)
    if count == 1:
        return MappedFile(path, [opened])
    siblings = _part_paths(opened, count)
    parts = [opened if sibling == path else _read_part(sibling) for sibling in siblings]
    for number, part in enumerate(parts):
        for key, expected in (("split.count", count), ("split.no", number)):
            if (value := _integer(part.path, part.metadata, key, -1, at_least=0)) != expected:
                fail(part.path, f"{key} is {value}; expected {expected}")
    return MappedFile(path, parts)


def _part_paths(opened: Part, count: int) -> list[Path]:
    """The paths of all parts of a split model, which exist; the file's own name gives theirs."""
    match = PART_NAME.fullmatch(opened.path.name)
    if match is None or int(match["count"]) != count:
        fail(opened.path, f"split.count is {count}; so the name has to end in -NNNNN-of-{count:05}.gguf")
    folder, stem = opened.path.parent, match["stem"]
    paths = [folder / f"{stem}-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        fail(opened.path, f"split.count is {count}; missing beside it: {', '.join(missing[:3])}{more}")
    return paths


def _index(parts: Sequence[Part]) -> dict[str, TensorInfo]:
    """All tensors by name, from all parts."""
    tensors: dict[str, TensorInfo] = {}
    for number, part in enumerate(parts):
        for info in part.tensors:
            if info.name in tensors:
                fail(part.path, f"tensor {shown(info.name)} stands twice in the index")
            tensors[info.name] = replace(info, part=number)
    first = parts[0]
    expected = _integer(first.path, first.metadata, "split.tensors.count", len(tensors), at_least=0)
    if expected != len(tensors):
        fail(first.path, f"split.tensors.count is {expected}; the parts hold {len(tensors)} tensors")
    return tensors


def _read_part(path: Path) -> Part:
    """One file, mapped, with its header, metadata and tensor index read and checked."""
    if not path.is_file():
        raise ModelFileError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with path.open("rb") as file:
            if (size := file.seek(0, 2)) == 0:
                fail(path, "the file is empty")
            map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    reader = HeaderReader(path, map)
    version = reader.version()
    tensor_count = reader.count("number of tensors", MIN_TENSOR)
    key_count = reader.count("number of keys", MIN_KEY)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.string("a metadata key")
        if key in metadata:
            reader.fail(f"key {shown(key)} stands twice in the metadata")
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
            fail(path, f"tensor {shown(info.name)}: offset {info.offset} is inside tensor {shown(before)}")
        end, before = info.offset + info.nbytes, info.name
        if end > size:
            fail(
                path,
                f"tensor {shown(info.name)}: {info.nbytes} bytes at offset {info.offset} end beyond "
                f"the file's {size} bytes (if it was cut short, download it again)",
            )


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = _integer(path, metadata, "general.alignment", DEFAULT_ALIGNMENT, at_least=1)
    if alignment.bit_count() != 1 or alignment > MAX_ALIGNMENT:
        fail(path, f"general.alignment is {alignment}; it has to be a power of two up to 2^31")
    return alignment


def _integer(path: Path, metadata: dict[str, Any], key: str, default: int, at_least: int) -> int:
    value = metadata.get(key, default)
    if type(value) is not int or value < at_least:
        fail(path, f"{key} is {shown(value)}; it has to be an integer of at least {at_least}")
    return value
