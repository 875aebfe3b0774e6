"""A model's file cut to some of its layers, stored as they were or trained."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.architectures import parameters, read_config
from realm_jax.config import ModelConfig
from realm_jax.errors import ModelFileError, RequestError, UnsupportedError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.quant import dequantize
from realm_jax.quant.encoding import tensor_bytes
from realm_jax.quantization.file_types import file_type_of, fitting
from realm_jax.weights import Params

LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def kept_layers(total: int, count: int) -> tuple[int, ...]:
    """Which of a model's layers a draft of `count` begins with: the first one and the last ones.

    Raises RequestError where the model has fewer.
    """
    if not 1 <= count <= total:
        raise RequestError(f"layers is {count}; the model has {total}, give from 1 to {total}")
    return (0, *range(total - count + 1, total))


@dataclass(frozen=True)
class Draft:
    """A smaller model made of another's layers, embedding, last norm and head, which has its vocabulary.

    kind: the type of the matrices, or what stands in for it where their rows do not fit.
    """

    file: GGUFFile
    layers: tuple[int, ...]  # of the file, in the draft's order
    kind: GGMLType

    def __post_init__(self) -> None:
        """Raises UnsupportedError for a model whose layers differ or have more than matrices and norms."""
        name, config = self.file.path.name, read_config(self.file)
        per_layer = [
            key
            for key, value in self.file.metadata.items()
            if key.startswith(f"{config.architecture}.") and isinstance(value, np.ndarray)
        ]
        if len(set(config.layers)) > 1 or per_layer:
            raise UnsupportedError(
                f"{name}: its layers differ; drafts are made of models whose layers are alike"
            )
        if config.moe is not None or any(tensor.endswith(".bias") for tensor in self.file.tensors):
            raise UnsupportedError(f"{name}: drafts are not made of models with experts or biases")
        if config.logit_softcap is not None:
            raise UnsupportedError(f"{name}: drafts are not made of models whose logits are capped")

    def write(self, path: Path, trained: Mapping[str, np.ndarray] | None = None) -> None:
        """`path` holds the draft, with the model's tokenizer and chat template.

        trained: values of the layers and the last norm by the draft's names; None = as the model has them,
        and in its types. Embedding and head are the model's.
        """
        found = dict(self._tensors())
        plans = [
            writer.TensorPlan(name, info.shape, self._type_of(name, info, is_trained=trained is not None))
            for name, info in found.items()
        ]

        def data() -> Iterator[list[bytes]]:
            for plan, info in zip(plans, found.values(), strict=True):
                yield [self._encoded(info, plan, (trained or {}).get(plan.name))]

        alignment = self.file.metadata.get("general.alignment", 32)
        writer.write(path, self._metadata(), plans, data(), alignment=alignment)

    def _tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """The draft's tensors, as the file has them."""
        for name, info in self.file.tensors.items():
            if (match := LAYER.fullmatch(name)) is None:
                yield name, info
            elif int(match[1]) in self.layers:
                yield f"blk.{self.layers.index(int(match[1]))}.{match[2]}", info

    def _type_of(self, name: str, info: TensorInfo, *, is_trained: bool) -> GGMLType:
        is_layer = LAYER.fullmatch(name) is not None
        if len(info.shape) == 1 or (is_layer and not is_trained):
            return info.ggml_type
        return fitting(self.kind, info.shape[-1])

    def _encoded(self, info: TensorInfo, plan: writer.TensorPlan, values: np.ndarray | None) -> bytes:
        if values is None:
            data = self.file.data(info.name)
            if plan.ggml_type == info.ggml_type:
                return data.tobytes()
            values = dequantize(data, info.ggml_type, info.shape)
        if values.shape != plan.shape:
            raise ModelFileError(
                f"{plan.name}: trained values are {list(values.shape)}, not {list(plan.shape)}"
            )
        return tensor_bytes(plan.name, values, plan.ggml_type)

    def _metadata(self) -> dict[str, bytes]:
        """The model's, byte for byte, but for what says how large it is."""
        facts, count = self.file.metadata, len(self.layers)
        kept = writer.unsplit_metadata(self.file.split_paths[0])
        kept.pop("general.size_label", None)
        name = facts.get("general.name", self.file.path.stem)
        kept["general.name"] = writer.text_value(f"{name}: draft of {count} layers")
        kept[f"{facts['general.architecture']}.block_count"] = writer.count_value(count)
        return kept | file_type_of(self.kind).metadata()


def tensors(params: Params, config: ModelConfig) -> dict[str, np.ndarray]:
    """The layers and the last norm by GGUF tensor, of params that are plain numbers."""
    found: dict[str, np.ndarray] = {}
    for parameter in parameters(config):
        if parameter.path in (("embedding",), ("head",)):
            continue
        node: Any = params
        for name in parameter.path:
            node = node[name]
        ends = np.cumsum([part.shape[0] for part in parameter.parts])[:-1]
        pieces = np.split(np.asarray(node.weight, np.float32), ends)
        found |= {f"{part.name}.weight": piece for part, piece in zip(parameter.parts, pieces, strict=True)}
    return found
