"""A folder as Hugging Face has models: config.json, weights in safetensors files, the tokenizer's files."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realm_jax.convert.fields import Fields, read_object
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.fitting import shown
from realm_jax.lora.safetensors_file import Entry, SafetensorsFile

INDEX = "model.safetensors.index.json"
MAX_FILES = 10_000
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.bin")
# Gemma3ForConditionalGeneration has the language model within another, by either of these names.
WITHIN = re.compile(r"(?:language_model\.(?=model\.|lm_head\.)|model\.language_model\.)")
OTHER_PARTS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


@dataclass(frozen=True)
class HFTensor:
    """A tensor of one of the folder's files."""

    file: SafetensorsFile
    name: str
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def rows(self, first: int, count: int) -> np.ndarray:
        """Some rows, or some values of a vector, as float32."""
        return self.file.rows(self.name, first, count)


@dataclass(frozen=True)
class HFFolder:
    """What a folder says of its model, and the tensors by the names that the language model has alone."""

    path: Path
    config: Fields
    generation: Fields
    tensors: dict[str, HFTensor]
    left_out: int  # tensors of other parts of the model, such as its eyes

    @classmethod
    def open(cls, path: Path) -> "HFFolder":
        """Raises ModelFileError for a broken folder or pickles, UnsupportedError for quantized weights."""
        if not path.is_dir():
            what = "no folder" if path.exists() else "no such folder"
            raise ModelFileError(
                f"{path}: {what} (give one on this machine: hf download OWNER/REPO --local-dir DIR)"
            )
        if not (path / "config.json").is_file():
            raise ModelFileError(
                f"{path}: no config.json (give the folder of a model of Hugging Face's form)"
            )
        config = read_object(path / "config.json")
        if (kind := config.section("quantization_config")) is not None:
            method = shown(str(kind.get("quant_method")))
            raise UnsupportedError(
                f"config.json: quantization_config is {method!r}; weights are converted from 16 or 32 bits "
                "(convert the model that this one was quantized from)"
            )
        found = {tensor.name: tensor for file in _files(path) for tensor in _tensors(file)}
        tensors = {
            WITHIN.sub("model." if name.startswith("model.") else "", name, count=1): tensor
            for name, tensor in found.items()
            if not OTHER_PARTS.match(name)
        }
        kept = sum(not OTHER_PARTS.match(name) for name in found)
        if len(tensors) != kept:
            raise ModelFileError(f"{path.name}: holds tensors of two language models")
        generation = read_object(path / "generation_config.json", required=False)
        return cls(path, config, generation, tensors, len(found) - kept)

    def dtype(self, name: str) -> str:
        return self.tensors[name].entry.dtype


def _tensors(file: SafetensorsFile) -> Iterator[HFTensor]:
    return (HFTensor(file, name, entry) for name, entry in file.entries.items())


def _files(path: Path) -> list[SafetensorsFile]:
    """The folder's files of weights, opened; no tensor stands in two of them."""
    files = [SafetensorsFile(path / name) for name in _names(path)]
    owners: dict[str, str] = {}
    for file in files:
        for name in file.entries:
            if name in owners:
                raise ModelFileError(f"{file.path.name}: {shown(name)} stands in {owners[name]} too")
            owners[name] = file.path.name
    return files


def _names(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        index = read_object(path / INDEX)
        places = index.section("weight_map")
        names = sorted({str(name) for name in places.values.values()}) if places else []
        if not 1 <= len(names) <= MAX_FILES:
            raise index.error("weight_map", f"names {len(names):,} files; it must be 1 to {MAX_FILES:,}")
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise index.error("weight_map", f"names the file {shown(name)!r}; only files beside it count")
        with suppress(OSError, ValueError):  # a name that the system refuses is told where it is opened
            if missing := [name for name in names if not (path / name).is_file()]:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                raise index.error(
                    "weight_map", f"names files that are missing: {', '.join(missing[:3])}{more}"
                )
        return names
    if (path / "model.safetensors").is_file():
        return ["model.safetensors"]
    if pickles := [found.name for pattern in PICKLES for found in path.glob(pattern)]:
        raise UnsupportedError(
            f"{shown(pickles[0])}: is a pickle, which can run any code when it is opened; it is not read "
            "(load the model where you trust it, and save_pretrained(..., safe_serialization=True))"
        )
    raise ModelFileError(f"{path}: no model.safetensors and no {INDEX}")
