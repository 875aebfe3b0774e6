"""A model's file as if adapters had been trained into it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8

from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo
from realm_jax.lora.adapter import Adapter
from realm_jax.lora.fold import fold
from realm_jax.quant import dequantize


class FoldedFile:
    """Reads as the file does, but the tensors that adapters change are float32, folded when asked for.

    adapters: each with the scale by which its change is multiplied; changes add up.
    """

    def __init__(self, file: GGUFFile, adapters: Sequence[tuple[Adapter, float]]) -> None:
        self.path = file.path
        self._file, self._adapters = file, adapters
        self.tensors: dict[str, TensorInfo] = {
            name: self._as_float32(info) if self._is_changed(name) else info
            for name, info in file.tensors.items()
        }

    def data(self, name: str) -> UInt8[np.ndarray, " bytes"]:
        """The tensor's bytes."""
        data = self._file.data(name)
        if not self._is_changed(name):
            return data
        info = self._file.tensors[name]
        folded = fold(dequantize(data, info.ggml_type, info.shape), name, self._adapters, 0)
        return np.ascontiguousarray(folded, np.float32).reshape(-1).view(np.uint8)

    def release(self, name: str) -> None:
        """As `GGUFFile.release`."""
        self._file.release(name)

    def _is_changed(self, name: str) -> bool:
        return any(scale and adapter.changes(name) for adapter, scale in self._adapters)

    @staticmethod
    def _as_float32(info: TensorInfo) -> TensorInfo:
        return replace(info, ggml_type=GGMLType.F32, nbytes=4 * int(np.prod(info.shape, dtype=object)))
