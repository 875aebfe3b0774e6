"""A model as a directory: its metadata as GGUF states them, its tensors as arrays of an Orbax checkpoint.

    header.gguf   the metadata (architecture, tokenizer, chat template): a GGUF file without tensors
    tensors/      an Orbax checkpoint (OCDBT): an array for each tensor, by the tensor's name
    index.json    written last: each tensor's name, type, shape and SHA-256, and the SHA-256 of header.gguf

Tensors of plain numbers are arrays of these, in their shape; of packed types the arrays are bytes, a row of
blocks in each row. So a directory holds the very bytes of a GGUF file, and all that knows formats reads both.

The arrays are read by TensorStore, which Orbax itself reads by: one at a time, in any thread, and without the
barriers with which Orbax makes the processes of a mesh wait for each other.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax import gguf
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.gguf.header import MAX_DIMS, TensorInfo, fail, shown

HEADER, ARRAYS, INDEX = "header.gguf", "tensors", "index.json"
FORMAT = "realm_jax checkpoint 1"
MAX_INDEX = 16 << 20  # 100,000 tensors
MAX_EXPANSION = 2
"""So many times what lies on disk the arrays may be: they are not compressed, but zeros are left out."""
SMALL = 64 << 20  # bytes of arrays that are allowed whatever lies on disk
KEPT = 3
"""Stacked experts are asked for one by one: so many of their arrays are kept for the next."""
BYTES = "|u1"
PLAIN = {
    GGMLType.F32: "<f4",
    GGMLType.F16: "<f2",
    GGMLType.BF16: "bfloat16",
    GGMLType.F64: "<f8",
    GGMLType.I8: "|i1",
    GGMLType.I16: "<i2",
    GGMLType.I32: "<i4",
    GGMLType.I64: "<i8",
}


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is such a directory, or a part of one."""
    return any((path / name).exists() for name in (HEADER, ARRAYS, INDEX))


def standing_for(path: Path) -> Path:
    """The file whose checksum tells models apart: the model's own, or the index with the checksums of all."""
    return path / INDEX if path.is_dir() else path


def array_shape(info: TensorInfo) -> tuple[int, ...]:
    """The shape of the tensor's array."""
    *outer, inputs = info.shape
    block = BLOCK_SIZES[info.ggml_type]
    return info.shape if info.ggml_type in PLAIN else (*outer, inputs // block.elements * block.nbytes)


class CheckpointFile(gguf.GGUFFile):
    """An open directory; bytes of a tensor are read, and their checksum compared, whenever asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError for a directory that is not complete, or broken."""
        if not path.is_dir() or not is_checkpoint(path):
            raise ModelFileError(f"{path}: a folder, and no checkpoint (realm convert orbax makes one)")
        if not (path / INDEX).is_file():
            raise ModelFileError(
                f"{path}: no {INDEX}, which is written last: the checkpoint is not complete "
                "(copy all of it, or convert again)"
            )
        self.path = path = path if path.name else path.resolve()
        self.nbytes = _disk_bytes(path)
        index = _read_index(path)
        _check_header(path, index)
        with gguf.open(path / HEADER) as header:
            self.version, self.metadata = header.version, header.metadata
            if header.tensors:
                fail(path, f"{HEADER} has {len(header.tensors)} tensors; it must have none")
        self.split_paths = [path / HEADER]
        self.tensors, self._checksums = _tensors(path, index)
        total = sum(info.nbytes for info in self.tensors.values())
        if total > MAX_EXPANSION * self.nbytes + SMALL:
            fail(path, f"{INDEX} states {total:,} bytes of tensors; the directory has {self.nbytes:,}")
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def data(self, name: str) -> np.ndarray:
        if len(self.tensors[name].shape) < 3:
            return self._read(name)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = self._read(name)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return self._kept[name]

    def release(self, name: str) -> None:
        """Nothing to give back: an array goes with its last view, experts with the third after them."""

    def close(self) -> None:
        self._kept.clear()

    @cached_property
    def _store(self) -> Any:
        try:
            import tensorstore
        except ImportError as error:
            raise UnsupportedError(
                f"{self.path} is a checkpoint, which needs orbax: pip install 'realm-jax[train]'"
            ) from error
        return tensorstore

    def _read(self, name: str) -> np.ndarray:
        """The tensor's bytes, which are those that were saved."""
        info = self.tensors[name]
        shape = list(array_shape(info))
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": (self.path / ARRAYS).absolute().as_uri(),
                "path": f"{name}/",
            },
            # what is not so is refused before anything of it is allocated
            "metadata": {
                "dtype": PLAIN.get(info.ggml_type, BYTES),
                "shape": shape,
                "chunks": shape,
                "compressor": None,
            },
        }
        try:
            array = self._store.open(spec, read=True, open=True).result().read().result()
        except (ValueError, OSError, KeyError, RuntimeError, MemoryError) as error:
            reason = shown(" ".join(str(error).split()))
            fail(self.path, f"tensor {shown(name)} cannot be read: {reason} (copy the folder again)")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if hashlib.sha256(data.data).hexdigest() != self._checksums[name]:
            fail(
                self.path,
                f"tensor {shown(name)} is not what was saved: its checksum is another (copy it again)",
            )
        return data


def _read_index(path: Path) -> dict[str, Any]:
    file = path / INDEX
    try:
        if (size := file.stat().st_size) > MAX_INDEX:
            fail(path, f"{INDEX} has {size:,} bytes; the limit is {MAX_INDEX:,}")
        index = json.loads(file.read_bytes())
    except OSError as error:
        fail(path, f"{INDEX} cannot be read: {error.strerror}")
    except (ValueError, RecursionError):
        fail(path, f"{INDEX} is no JSON: the checkpoint is broken (copy or convert again)")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        said = index.get("format") if isinstance(index, dict) else None
        fail(path, f"{INDEX}: format is {shown(said)}; {FORMAT!r} is read")
    return index


def _check_header(path: Path, index: dict[str, Any]) -> None:
    try:
        with (path / HEADER).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        fail(path, f"{HEADER} cannot be read: {error.strerror}")
    if found != index.get("header"):
        fail(path, f"{HEADER} is not what was saved: its checksum is another (copy or convert again)")


def _tensors(path: Path, index: dict[str, Any]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors that the index lists, each checked as that of a GGUF file is, and their checksums."""
    entries = index.get("tensors")
    if not isinstance(entries, list):
        fail(path, f"{INDEX}: tensors is no list")
    infos: dict[str, TensorInfo] = {}
    checksums: dict[str, str] = {}
    for entry in entries:
        fields = entry if isinstance(entry, dict) else {}
        name, checksum = fields.get("name"), fields.get("sha256")
        if not isinstance(name, str) or name in infos or not isinstance(checksum, str):
            fail(path, f"{INDEX}: tensor {shown(name)} has no name of its own, or no sha256")
        infos[name] = _tensor(path, name, fields.get("shape"), fields.get("type"))
        checksums[name] = checksum
    return infos, checksums


def _tensor(path: Path, name: str, shape: Any, kind: Any) -> TensorInfo:
    what = f"{INDEX}: tensor {shown(name)}"
    if not isinstance(kind, str) or kind not in GGMLType.__members__:
        fail(path, f"{what}: unknown ggml type {shown(kind)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= MAX_DIMS:
        fail(path, f"{what}: shape is {shown(shape)}")
    if not all(type(n) is int and 0 < n < 1 << 48 for n in shape):
        fail(path, f"{what}: shape is {shown(shape)}")
    block = BLOCK_SIZES[GGMLType[kind]]
    if shape[-1] % block.elements:
        fail(path, f"{what}: rows of {shape[-1]} are no multiple of {kind}'s {block.elements}")
    nbytes = prod(shape) // block.elements * block.nbytes
    return TensorInfo(name, tuple(shape), GGMLType[kind], nbytes, 0)


def _disk_bytes(path: Path) -> int:
    """What the folder's files take. Raises ModelFileError for a pipe or the like, whose reader never ends."""
    total = 0
    for each in path.rglob("*"):
        if each.is_file():
            total += each.stat().st_size
        elif each.is_symlink() or not each.is_dir():
            name = shown(str(each.relative_to(path)))
            fail(path, f"{name} is neither a file nor a folder of its own (copy the folder again)")
    return total
