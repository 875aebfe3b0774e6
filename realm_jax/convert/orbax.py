"""A GGUF file -> a directory with an Orbax checkpoint of its tensors; `gguf.checkpoint` has the form."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from realm_jax import weights
from realm_jax.architectures import read_config
from realm_jax.errors import ModelFileError, RequestError, UnsupportedError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.gguf.checkpoint import ARRAYS, BYTES, FORMAT, HEADER, INDEX, PLAIN, array_shape
from realm_jax.quant import dequantize
from realm_jax.quantization.file_types import FILE_TYPES

Dense = Literal["bf16", "f32"]
NUMPY = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Checkpoint:
    """A model that will be a directory.

    dense: None = tensors stay as they are, bit for bit; else packed ones are expanded to it, which takes the
      memory of the expanded model.
    """

    file: GGUFFile
    dense: Dense | None = None

    def write(self, target: Path, progress: Callable[[str], None] | None = None) -> None:
        """`target` holds the model; until it is whole, it is not there.

        Raises RequestError if something is there already, ModelFileError for a file that is no model or a
        place that cannot be written.
        """
        if target.exists() or target.is_symlink():
            raise RequestError(f"{target} is there already; give another folder, or remove it")
        weights.check_tensors(self.file, read_config(self.file))
        partial = target.parent / f"{target.name}.{os.getpid()}.partial"
        try:
            partial.mkdir(parents=True)
            writer.require_room(partial, sum(self._size(info) for info in self.file.tensors.values()))
            self._write(partial, progress)
            partial.rename(target)
        except OSError as error:
            raise ModelFileError(f"{target}: cannot be written: {error.strerror or error}") from error
        finally:
            with suppress(OSError):
                shutil.rmtree(partial)

    def _write(self, folder: Path, progress: Callable[[str], None] | None) -> None:
        writer.write(folder / HEADER, self._metadata(), [], [])
        arrays: dict[str, np.ndarray] = {}
        entries: list[dict[str, Any]] = []
        for info in self.file.tensors.values():
            if progress is not None:
                progress(info.name)
            stored, data = self._stored(info)
            dtype = np.dtype(NUMPY.get(name := PLAIN.get(stored.ggml_type, BYTES), name))
            arrays[info.name] = data.view(dtype).reshape(array_shape(stored))
            checksum = hashlib.sha256(data.data).hexdigest()
            entries.append(
                {"name": info.name, "type": stored.ggml_type.name, "shape": info.shape, "sha256": checksum}
            )
        _save(folder / ARRAYS, arrays)
        header = hashlib.sha256((folder / HEADER).read_bytes()).hexdigest()
        with (folder / INDEX).open("x") as index:
            json.dump({"format": FORMAT, "header": header, "tensors": entries}, index, indent=0)
            index.flush()
            os.fsync(index.fileno())

    def _size(self, info: TensorInfo) -> int:
        """The bytes that the tensor will have."""
        if self.dense is None or info.ggml_type in PLAIN:
            return info.nbytes
        return BLOCK_SIZES[GGMLType[self.dense.upper()]].nbytes * prod(info.shape)

    def _stored(self, info: TensorInfo) -> tuple[TensorInfo, np.ndarray]:
        """The tensor as the directory has it, and its bytes."""
        data = self.file.data(info.name)
        if self.dense is None or info.ggml_type in PLAIN:
            return info, data
        kind = GGMLType[self.dense.upper()]
        values = dequantize(data, info.ggml_type, info.shape)
        wide = values.astype(ml_dtypes.bfloat16) if kind == GGMLType.BF16 else values
        return replace(info, ggml_type=kind, nbytes=wide.nbytes), wide.reshape(-1).view(np.uint8)

    def _metadata(self) -> dict[str, bytes]:
        """The file's, byte for byte; it is in one part, and says its new type."""
        kept = writer.unsplit_metadata(self.file.split_paths[0])
        if self.dense is not None:
            kept["general.file_type"] = writer.count_value(FILE_TYPES[self.dense.upper()].number)
            kept.pop("general.quantization_version", None)
        return kept


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise UnsupportedError("checkpoints need orbax: pip install 'realm-jax[train]'") from error
    # as the reader wants them: zarr's second form, not compressed, in one key-value store
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(arrays))  # pyright: ignore[reportCallIssue]
        except ValueError as error:  # of TensorStore, where the disk is full
            raise OSError(0, " ".join(str(error).split())[:200]) from error
