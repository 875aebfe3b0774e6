"""LoRA adapters: read from GGUF and PEFT files, applied to weight nodes."""

from pathlib import Path

from realm_jax.lora.adapter import Adapter, Base, LowRank
from realm_jax.lora.gguf_adapter import read_gguf

__all__ = ["Adapter", "Base", "LowRank", "read"]


def read(path: Path, base: Base) -> Adapter:
    """The adapter at `path`, which fits the base.

    Raises ModelFileError for a broken file and with every tensor that does not fit, UnsupportedError for
    what is valid but not served.
    """
    return read_gguf(path, base)
