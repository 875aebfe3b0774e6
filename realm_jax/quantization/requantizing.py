"""A model file in another type: tensor after tensor, a few million values at a time."""

import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from math import prod
from pathlib import Path

from realm_jax.errors import ModelFileError, RequestError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.quant import FORMATS, BlockFormat, dequantize
from realm_jax.quant.encoding import CHUNK, encode
from realm_jax.quantization.file_types import FileType, fitting
from realm_jax.quantization.importance import ImportanceMatrix
from realm_jax.quantization.mixes import Facts, Mix
from realm_jax.quantization.rewriting import Progress, rewrite

AHEAD = 8
"""Chunks a thread that are encoded before they are written."""


@dataclass(frozen=True)
class Quantization:
    """What becomes of a model file.

    head, embedding: types asked for. pure: no mix, all matrices in the type itself. allow_requantize: from
    types that are rounded already. threads: None = all processors.
    """

    file: GGUFFile
    file_type: FileType
    importance: ImportanceMatrix | None = None
    head: GGMLType | None = None
    embedding: GGMLType | None = None
    pure: bool = False
    allow_requantize: bool = False
    threads: int | None = None

    @cached_property
    def wanted(self) -> dict[str, GGMLType]:
        """The type of each tensor by the mix."""
        infos = self.file.tensors.values()
        facts = Facts.of(
            self.file.metadata,
            self.file.tensors,
            self.file.path.name,
            has_importance=self.importance is not None,
        )
        return Mix(self.file_type, facts, self.head, self.embedding, self.pure).types(infos)

    @cached_property
    def types(self) -> dict[str, GGMLType]:
        """The type of each tensor: that of the mix, or where its rows do not fit, the one that stands in."""
        return {
            name: kind if kind is info.ggml_type else fitting(kind, info.shape[-1])
            for name, info in self.file.tensors.items()
            for kind in (self.wanted[name],)
        }

    @property
    def fallbacks(self) -> dict[str, tuple[GGMLType, GGMLType]]:
        """The wanted and the actual type where they differ."""
        pairs = {name: (kind, self.types[name]) for name, kind in self.wanted.items()}
        return {name: pair for name, pair in pairs.items() if pair[0] is not pair[1]}

    @property
    def unweighted(self) -> list[str]:
        """Matrices that change their type and are not in the importance matrix."""
        matrix = self.importance
        return [] if matrix is None else [i.name for i in self._changed if matrix.of(i) is None]

    @property
    def _changed(self) -> list[TensorInfo]:
        return [info for info in self.file.tensors.values() if self.types[info.name] is not info.ggml_type]

    def check(self) -> None:
        """Raises RequestError where this is not to be done."""
        for info in self._changed:
            if isinstance(FORMATS[info.ggml_type], BlockFormat) and not self.allow_requantize:
                raise RequestError(
                    f"{self.file.path.name}: {info.name} is {info.ggml_type.name}, rounded already; "
                    "start from F32, F16 or BF16, or give --allow-requantize, which loses more"
                )
        if self.file_type.name == "Q2_K_S":
            self._check_importance()

    def _check_importance(self) -> None:
        """Every matrix in Q2_K, but the head and the embedding, is in the importance matrix."""
        for info in self._changed:
            is_spared = info.name in ("token_embd.weight", "output.weight")
            is_known = self.importance is not None and self.importance.of(info) is not None
            if self.types[info.name] is GGMLType.Q2_K and not is_spared and not is_known:
                raise RequestError(
                    f"Q2_K_S needs the importance of {info.name} (give --imatrix, or take Q2_K)"
                )

    def write(self, path: Path, progress: Progress | None = None) -> None:
        """`path` holds the model in its new types, with its metadata.

        Raises RequestError as `check`, ModelFileError for values that cannot be rounded.
        """
        self.check()
        threads = self.threads or os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            chunks = partial(self._chunks, pool, AHEAD * threads)
            rewrite(self.file, path, self._metadata(), self.types, chunks, progress)

    def _metadata(self) -> dict[str, bytes]:
        """The file's, byte for byte; the result is in one part, and says its new type."""
        kept = writer.unsplit_metadata(self.file.split_paths[0])
        seen = {} if self.importance is None else self.importance.metadata()
        return kept | self.file_type.metadata() | seen

    def _chunks(
        self, pool: ThreadPoolExecutor, ahead: int, info: TensorInfo, kind: GGMLType
    ) -> Iterator[writer.Chunk]:
        """The tensor's bytes in this type, some rows at a time."""
        data = self.file.data(info.name)
        if kind is info.ggml_type:
            yield data.data
            return
        importance = None if self.importance is None else self.importance.of(info)
        rows, columns = prod(info.shape[:-1]), info.shape[-1]
        each, per_expert = info.nbytes // rows, rows if importance is None else rows // len(importance)

        def encoded(span: tuple[int, int]) -> bytes:
            first, last = span
            mine = None if importance is None else importance[first // per_expert]
            shape = (last - first, columns)
            values = dequantize(data[first * each : last * each], info.ggml_type, shape)
            try:
                return encode(values, kind, mine).tobytes()
            except ModelFileError as error:
                raise ModelFileError(f"{self.file.path.name}: {info.name}: {error}") from None

        spans = _spans(rows, per_expert, max(1, CHUNK // columns))
        while some := list(islice(spans, ahead)):
            yield from pool.map(encoded, some)

    def summary(self) -> str:
        """Sizes before and after, and how many tensors have which type."""
        plans = (writer.TensorPlan(i.name, i.shape, self.types[i.name]) for i in self.file.tensors.values())
        before, after = sum(info.nbytes for info in self.file.tensors.values()), sum(p.nbytes for p in plans)
        values = sum(prod(info.shape) for info in self.file.tensors.values())
        kinds = Counter(kind.name for kind in self.types.values()).most_common()
        return (
            f"{before / 2**20:,.1f} MiB to {after / 2**20:,.1f} MiB, {8 * after / values:.2f} bits a value: "
            + ", ".join(f"{count} {name}" for name, count in kinds)
        )


def _spans(rows: int, per_expert: int, step: int) -> Iterator[tuple[int, int]]:
    """Neighbouring rows, at most `step`, that belong to one expert."""
    for start in range(0, rows, per_expert):
        for first in range(start, start + per_expert, step):
            yield first, min(first + step, start + per_expert)
