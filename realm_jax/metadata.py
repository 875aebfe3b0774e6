"""Checked access to GGUF metadata: a wrong or missing key is an error that names it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from realm_jax.errors import ModelFileError, UnsupportedError


class Metadata:
    """The keys of one architecture; `count("block_count", ...)` reads `llama.block_count`."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._all = metadata
        self.architecture = self._all.get("general.architecture")
        if not isinstance(self.architecture, str):
            raise ModelFileError(f"{source}: general.architecture is missing or no string")

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._all

    def _value(self, key: str, default: Any) -> tuple[str, Any]:
        name = f"{self.architecture}.{key}"
        value = self._all.get(name, default)
        if value is None:
            raise ModelFileError(f"{self.source}: required key {name} is missing")
        return name, value

    def scalar(self, key: str, default: Any) -> Any:
        """The value of an optional key; an array or a list is an error."""
        value = self._all.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray | list):
            raise ModelFileError(
                f"{self.source}: {self.architecture}.{key} is {_shown(value)}; it must be a single value"
            )
        return value

    def count(self, key: str, most: int, *, default: int | None = None) -> int:
        """A whole number from 1 (or 0, where that is the default) to `most`.

        An array, one value a layer, is accepted where all values agree.
        """
        name, value = self._value(key, default)
        if isinstance(value, np.ndarray) and value.size:
            if (value != value[0]).any():
                raise UnsupportedError(
                    f"{self.source}: {name} differs between layers; one value is supported"
                )
            value = value[0].item()
        least = 0 if default == 0 else 1
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ModelFileError(
                f"{self.source}: {name} is {_shown(value)}; it must be from {least} to {most:,}"
            )
        return value

    def counts(self, key: str, layers: int, most: int) -> list[int]:
        """A whole number from 1 to `most` for each layer: an array of them, or one for all."""
        name, value = self._value(key, None)
        if not isinstance(value, np.ndarray):
            return [self.count(key, most)] * layers
        if value.shape != (layers,) or value.dtype.kind not in "iu":
            raise ModelFileError(
                f"{self.source}: {name} is {_shown(value)}; it must have a whole number for each of "
                f"{layers:,} layers"
            )
        if not ((value >= 1) & (value <= most)).all():
            raise ModelFileError(f"{self.source}: {name} must have numbers from 1 to {most:,}")
        return value.tolist()

    def real(self, key: str, *, default: float | None = None, above: float) -> float:
        """A finite number greater than `above`."""
        name, value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ModelFileError(f"{self.source}: {name} is {_shown(value)}; it must be a finite number")
        if not max(above, 1e-30) <= value <= 1e30 or value == above:  # float32 holds what comes of it
            raise ModelFileError(f"{self.source}: {name} is {_shown(value)}; it must be above {above:g}")
        return float(value)

    def softcap(self, key: str, default: float | None) -> float | None:
        """A cap on scores; None or a file's 0 = no cap."""
        if self.scalar(key, default) == 0:
            return None
        if default is None and not self.has(key):
            return None
        return self.real(key, default=default, above=0.0)

    def rope_scaling(self) -> tuple[Literal["none", "linear", "yarn"], float]:
        """How rope is scaled and by what; a factor without a type means linear."""
        key = "rope.scaling.type"
        kind = self.scalar(key, "linear")
        old = self.real("rope.scale_linear", default=1.0, above=0.0)
        factor = self.real("rope.scaling.factor", default=old, above=0.0)
        if kind not in ("none", "linear", "yarn", "longrope"):
            raise UnsupportedError(
                f"{self.source}: {self.architecture}.{key} is {kind!r}; known: none, linear, yarn, longrope"
            )
        if kind in ("none", "longrope") or factor == 1.0:
            return "none", 1.0
        return kind, factor

    def window_layers(self, layers: int, period: int) -> list[bool]:
        """Whether each layer is windowed: an array of flags, or a period n with layer % n < n - 1."""
        key = "attention.sliding_window_pattern"
        flags = self._all.get(f"{self.architecture}.{key}")
        if isinstance(flags, np.ndarray):
            if flags.shape != (layers,):
                raise ModelFileError(
                    f"{self.source}: {self.architecture}.{key} has {flags.size} flags for {layers} layers"
                )
            return [bool(flag) for flag in flags]
        period = self.count(key, 1 << 12, default=period)
        return [layer % period < period - 1 for layer in range(layers)]

    def flags(self, key: str) -> np.ndarray | None:
        """An optional array, one value a layer; None where the value is none."""
        value = self._all.get(f"{self.architecture}.{key}")
        return value if isinstance(value, np.ndarray) and value.ndim == 1 else None

    def vocabulary_size(self) -> int:
        """How many tokens the file lists, which the embedding must match."""
        tokens = self._all.get("tokenizer.ggml.tokens")
        if tokens is None:
            return self.count("vocab_size", 1 << 24)
        if not isinstance(tokens, list) or not tokens:
            raise ModelFileError(f"{self.source}: tokenizer.ggml.tokens is no list of strings")
        return len(tokens)


def _shown(value: Any) -> str:
    """A short, one-line form of any value."""
    if isinstance(value, np.ndarray | list):
        return f"an array of {len(value):,} values"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
