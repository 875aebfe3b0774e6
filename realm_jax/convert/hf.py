"""A folder of Hugging Face's form -> a GGUF file, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.architectures import read_config
from realm_jax.config import ModelConfig
from realm_jax.convert import agreement, tensors
from realm_jax.convert.facts import MOST_TOKENS, check_scale, read_facts, windows_lost
from realm_jax.convert.families import facts_of, family_of
from realm_jax.convert.fields import Fields
from realm_jax.convert.folder import HFFolder
from realm_jax.convert.tensors import Planned
from realm_jax.convert.tokenizer_files import HFTokenizer, read_tokenizer
from realm_jax.errors import ModelFileError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.lora.fitting import shown
from realm_jax.lora.modules import EMBEDDING
from realm_jax.quantization.file_types import QUANTIZATION_VERSION, file_type_of
from realm_jax.tokenizer import Tokenizer

KIND_OF = {"BF16": GGMLType.BF16, "F16": GGMLType.F16, "F32": GGMLType.F32, "F64": GGMLType.F32}
EMBEDDING_WEIGHT = f"{EMBEDDING}.weight"


@dataclass(frozen=True)
class Conversion:
    """A model, ready to be written. notes: what GGUF cannot say of it, for the user."""

    config: ModelConfig
    metadata: dict[str, Any]
    planned: list[Planned]
    notes: tuple[str, ...]

    def write(self, path: Path, progress: Callable[[str], None] | None = None) -> None:
        """`path` holds the model; until it is whole, it is not there."""

        def data() -> Iterator[Iterator[writer.Chunk]]:
            for each in self.planned:
                if progress is not None:
                    progress(each.plan.name)
                yield each.chunks()

        encoded = {key: writer.value(value) for key, value in self.metadata.items()}
        writer.write(path, encoded, [each.plan for each in self.planned], data())


def read(path: Path, kind: GGMLType | None = None) -> Conversion:
    """The model in the folder, checked; no weights are read yet.

    kind: the type of matrices; None = that of the embedding in the folder.
    Raises UnsupportedError for a model that is not converted or that GGUF cannot say exactly, ModelFileError
    for a broken folder.
    """
    folder = HFFolder.open(path)
    family = family_of(folder.config)
    fields = facts_of(folder.config, family)
    facts = read_facts(fields, family)
    size = _vocabulary_size(folder, fields)
    tokenizer = read_tokenizer(folder, fields, size)
    kind = KIND_OF[folder.dtype(EMBEDDING_WEIGHT)] if kind is None else kind
    metadata: dict[str, Any] = {
        "general.architecture": family.architecture,
        "general.type": "model",
        "general.name": _name(path, tokenizer),
        "general.file_type": file_type_of(kind).number,
        "general.quantization_version": QUANTIZATION_VERSION,
        **agreement.hints(folder.generation),
        **facts.keys,
        **tokenizer.keys,
    }
    agreement.check(folder, Tokenizer.from_metadata(metadata, path.name))
    config = read_config(_Unwritten(folder, metadata))
    check_scale(fields, config)
    planned = tensors.plan(folder, config, is_tied=facts.is_tied, kind=kind, factors=facts.ropes.tensors)
    notes = _notes(folder, tokenizer, windows_lost(fields, config))
    return Conversion(config, metadata, planned, tuple(notes))


def _notes(folder: HFFolder, tokenizer: HFTokenizer, lost: str | None) -> Iterator[str]:
    """What the file will not say of the model. lost: of its windows."""
    yield from tokenizer.notes
    if tokenizer.stripping and not tokenizer.names_phi3():
        stripping = ", ".join(shown(text) for text in tokenizer.stripping[:3])
        yield f"white space beside {stripping} is kept, which transformers strips: GGUF cannot say so"
    if lost is not None:
        yield lost
    if folder.left_out:
        yield f"{folder.left_out} tensors of other parts than the language model are left out"


def _name(path: Path, tokenizer: HFTokenizer) -> str:
    """The folder's name; by it readers of GGUF know whose tokens strip white space."""
    name = writer.path_text(path.resolve().name)
    is_known = any(part in name.lower() for part in ("phi-3", "phi3"))
    return f"{name} (Phi-3)" if tokenizer.names_phi3() and not is_known else name


def _vocabulary_size(folder: HFFolder, fields: Fields) -> int:
    """The rows of the embedding, which config.json must agree with: what follows is of that size."""
    if (embedding := folder.tensors.get(EMBEDDING_WEIGHT)) is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{folder.path.name}: {EMBEDDING_WEIGHT} is missing, or no matrix")
    if 0 in embedding.shape:  # rows that take no bytes could be any number
        raise ModelFileError(f"{folder.path.name}: {EMBEDDING_WEIGHT} is {list(embedding.shape)}")
    said = fields.count("vocab_size", MOST_TOKENS)
    if said != embedding.shape[0]:
        raise ModelFileError(
            f"{fields.source}: vocab_size is {said:,}; {EMBEDDING_WEIGHT} has {embedding.shape[0]:,} rows"
        )
    return said


class _Unwritten(GGUFFile):
    """The folder as a file to be: its metadata, and its tensors as the folder names them."""

    def __init__(self, folder: HFFolder, metadata: dict[str, Any]) -> None:
        self.path, self.version, self.metadata = folder.path, writer.VERSION, metadata
        self.tensors = {
            name: TensorInfo(
                name, tensor.shape, GGMLType.F32, 4 * int(np.prod(tensor.shape, dtype=object)), 0
            )
            for name, tensor in folder.tensors.items()
        }
        self.split_paths, self.nbytes = [], 0
        self._folder = folder

    def data(self, name: str) -> np.ndarray:
        tensor = self._folder.tensors[name]
        return tensor.rows(0, tensor.shape[0]).reshape(-1).view(np.uint8)

    def release(self, name: str) -> None:
        pass

    def close(self) -> None:
        pass
