"""A model file with adapters folded into it: the base's tensors one after another, changed or as they were.

No more than a few million values are in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np

from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.lora.adapter import Adapter
from realm_jax.lora.fold import fold
from realm_jax.quant import dequantize
from realm_jax.quant.int8 import quantize_q8_0
from realm_jax.quant.legacy import quantize_q4_0

TypeName = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
VALUES = 1 << 22  # that are expanded at a time
PLAIN = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
# llama.cpp's numbers of types that most tensors have
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
ENCODERS: dict[GGMLType, Callable[[np.ndarray], np.ndarray]] = {
    GGMLType.F32: lambda values: values.astype("<f4", copy=False),
    GGMLType.F16: lambda values: values.astype("<f2"),
    GGMLType.BF16: lambda values: values.astype(ml_dtypes.bfloat16),
    GGMLType.Q8_0: quantize_q8_0,
    GGMLType.Q4_0: quantize_q4_0,
}


@dataclass(frozen=True)
class Merge:
    """What is folded into which model, and how the result is stored.

    kind: the type of all matrices; those whose rows are no multiple of a block, and routers, take F16. None =
      tensors stay as they are, bit for bit, and changed ones that were quantized take F16.
    """

    file: GGUFFile
    adapters: Sequence[tuple[Adapter, float]]
    kind: TypeName | None = None

    def write(self, path: Path, progress: Callable[[str], None] | None = None) -> None:
        """`path` holds the merged model, with the base's metadata. Raises ModelFileError if it cannot."""
        infos = list(self.file.tensors.values())
        plans = [writer.TensorPlan(info.name, info.shape, self._type_of(info)) for info in infos]

        def tensors() -> Iterator[Iterator[writer.Chunk]]:
            for info, plan in zip(infos, plans, strict=True):
                if progress is not None:
                    progress(info.name)
                yield self._chunks(info, plan.ggml_type)
                self.file.release(info.name)

        alignment = self.file.metadata.get("general.alignment", 32)
        writer.write(path, self._metadata(plans), plans, tensors(), alignment=alignment)

    def _metadata(self, plans: Sequence[writer.TensorPlan]) -> dict[str, bytes]:
        """The base's, byte for byte; the file is in one part, and says its new type."""
        raw = writer.raw_metadata(self.file.split_paths[0])
        kept = {key: value for key, value in raw.items() if not key.startswith("split.")}
        if self.kind is not None:
            kept["general.file_type"] = writer.count_value(FILE_TYPES[self.kind])
        if any(plan.ggml_type not in PLAIN for plan in plans):
            kept.setdefault("general.quantization_version", writer.count_value(2))
        return kept

    def _changes(self, info: TensorInfo) -> bool:
        return any(scale and adapter.changes(info.name) for adapter, scale in self.adapters)

    def _type_of(self, info: TensorInfo) -> GGMLType:
        inputs = info.shape[-1]
        is_matrix = len(info.shape) > 1 and info.name.endswith(".weight")
        if self.kind is None:
            return info.ggml_type if info.ggml_type in PLAIN or not self._changes(info) else GGMLType.F16
        if not is_matrix:
            return GGMLType.F32 if self._changes(info) else info.ggml_type
        wanted = GGMLType[self.kind.upper()]
        is_router = info.name.endswith("ffn_gate_inp.weight") and wanted not in PLAIN
        return GGMLType.F16 if is_router or inputs % BLOCK_SIZES[wanted].elements else wanted

    def _chunks(self, info: TensorInfo, kind: GGMLType) -> Iterator[writer.Chunk]:
        """The tensor's new bytes, some rows at a time."""
        data = self.file.data(info.name)
        if kind == info.ggml_type and not self._changes(info):
            yield data.data
            return
        *outer, inputs = info.shape
        rows = prod(outer)
        step = max(1, VALUES // inputs)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            shape = (count, inputs) if outer else info.shape  # a vector is one piece
            each = info.nbytes // rows
            values = dequantize(data[first * each :][: count * each], info.ggml_type, shape)
            yield self._encoded(info.name, fold(values, info.name, self.adapters, first), kind)

    def _encoded(self, name: str, values: np.ndarray, kind: GGMLType) -> bytes:
        with np.errstate(over="ignore"):
            encoded = ENCODERS[kind](values)
        if kind in PLAIN and not np.isfinite(encoded.astype(np.float32)).all():
            largest = float(np.abs(values).max())
            raise ModelFileError(
                f"{self.file.path.name}: {name} has values up to {largest:g}, which {kind.name} cannot hold "
                "(give --type bf16 or f32)"
            )
        return encoded.tobytes()
