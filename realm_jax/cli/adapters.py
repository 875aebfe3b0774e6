"""Adapters as the command line names them, and the models that they are for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.gguf import GGUFFile
    from realm_jax.lora import Base


def scaled(text: str) -> tuple[Path, float]:
    """The path and the scale of PATH[:SCALE]; a path that exists is not split."""
    path, colon, number = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        scale = float(number)
    except ValueError:
        return Path(text), 1.0
    if not math.isfinite(scale):
        raise RequestError(f"--lora {text}: the scale is {number}; it must be a finite number")
    return Path(path), scale


@contextmanager
def opened_base(model: str | None, *, offline: bool) -> Iterator[tuple["GGUFFile", "Base"]]:
    """The model's file, open, and what an adapter must fit."""
    from realm_jax import gguf, hub
    from realm_jax.architectures import read_config
    from realm_jax.lora import Base

    with gguf.open(hub.resolve(model, offline=offline)) as file:
        yield file, Base.of(file, read_config(file))
