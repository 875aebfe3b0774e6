"""LoRA adapters: read from GGUF and PEFT files, applied to weight nodes."""

from pathlib import Path
from typing import Any

from realm_jax.errors import ModelFileError
from realm_jax.lora.adapter import Adapter, Base, LowRank
from realm_jax.lora.folded import FoldedFile
from realm_jax.lora.gguf_adapter import read_gguf
from realm_jax.lora.peft import CONFIG, WEIGHTS, read_peft
from realm_jax.lora.safetensors_file import is_pickle, refuse_pickle
from realm_jax.lora.summary import summarize_gguf, summarize_peft

__all__ = ["Adapter", "Base", "FoldedFile", "LowRank", "is_gguf", "locate", "read", "summarize"]


def read(path: Path, base: Base) -> Adapter:
    """The adapter at `path`, which fits the base.

    path: a GGUF file, a safetensors file with adapter_config.json beside it, or the folder of the two.
    Raises ModelFileError for a broken file and with every tensor that does not fit, UnsupportedError for
    what is valid but not served.
    """
    file = locate(path)
    return read_gguf(file, base) if is_gguf(file) else read_peft(file, base)


def summarize(path: Path) -> dict[str, Any]:
    """What the file says of itself, for a person or a script."""
    file = locate(path)
    return summarize_gguf(file) if is_gguf(file) else summarize_peft(file)


def locate(path: Path) -> Path:
    """The file that holds the adapter's tensors: `path`, or what a folder has. Pickles are refused."""
    if path.name == CONFIG:
        path = path.parent
    if path.is_dir():
        files = [path / WEIGHTS, *sorted(path.glob("adapter_model.*"))]
        if (file := next((each for each in files if each.is_file()), None)) is None:
            raise ModelFileError(f"{path.name}: the folder has no {WEIGHTS}")
        path = file
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        if is_pickle(path):
            refuse_pickle(path)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    return path


def is_gguf(path: Path) -> bool:
    """Whether the file begins as GGUF files do."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
