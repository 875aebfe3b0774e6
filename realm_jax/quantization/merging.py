"""A model file with adapters folded into it: the base's tensors one after another, changed or as they were.

No more than a few million values are in memory at a time.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.lora.adapter import Adapter
from realm_jax.lora.fold import fold
from realm_jax.quant import dequantize
from realm_jax.quant.encoding import tensor_bytes
from realm_jax.quantization.file_types import PLAIN, QUANTIZATION_VERSION, file_type_of, pure_type
from realm_jax.quantization.rewriting import Progress, rewrite

VALUES = 1 << 22  # that are expanded at a time


@dataclass(frozen=True)
class Merge:
    """What is folded into which model, and how the result is stored.

    kind: the type of matrices, as of a pure `Quantization`; one that has it already and does not change stays
      as it is, bit for bit. None = so do all that do not change; others that were quantized take F16.
    """

    file: GGUFFile
    adapters: Sequence[tuple[Adapter, float]]
    kind: GGMLType | None = None

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """`path` holds the merged model, with the base's metadata. Raises ModelFileError if it cannot."""
        types = {info.name: self._type_of(info) for info in self.file.tensors.values()}
        rewrite(self.file, path, self._metadata(types.values()), types, self._chunks, progress)

    def _metadata(self, types: Iterable[GGMLType]) -> dict[str, bytes]:
        """The base's, byte for byte; the file is in one part, and says its new type."""
        kept = writer.unsplit_metadata(self.file.split_paths[0])
        if self.kind is not None:
            return kept | file_type_of(self.kind).metadata()
        if any(kind not in PLAIN for kind in types):
            kept.setdefault("general.quantization_version", writer.count_value(QUANTIZATION_VERSION))
        return kept

    def _changes(self, info: TensorInfo) -> bool:
        return any(scale and adapter.changes(info.name) for adapter, scale in self.adapters)

    def _type_of(self, info: TensorInfo) -> GGMLType:
        has_changed = self._changes(info)
        if self.kind is not None:
            return pure_type(replace(info, ggml_type=GGMLType.F32) if has_changed else info, self.kind)
        return GGMLType.F16 if has_changed and info.ggml_type not in PLAIN else info.ggml_type

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
            folded = fold(values, info.name, self.adapters, first)
            yield tensor_bytes(f"{self.file.path.name}: {info.name}", folded, kind)
