"""Reads `tokenizer.*` metadata. Every wrong value ends as a ModelFileError that names its key."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from realm_jax.errors import ModelFileError

MAX_TOKENS = 1 << 24
MAX_TOKEN_CHARACTERS = 4096

NO_TOKEN = 2**32 - 1  # -1 as some converters wrote it: the model has no such token
NEEDED = (".bos_token_id", ".eos_token_id")


@dataclass(frozen=True)
class Metadata:
    """The values of a GGUF file, each read with the type that its key must have."""

    values: Mapping[str, Any]
    source: str

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {key} {problem}")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {_shown(value)}; it must be a string")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, f"is {_shown(value)}; it must be true or false")
        return bool(value)

    def token_id(self, key: str, vocab_size: int) -> int | None:
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.error(key, f"is {_shown(value)}; it must be a token id")
        if value == NO_TOKEN and not key.endswith(NEEDED):
            return None
        if not 0 <= value < vocab_size:
            raise self.error(key, f"is {value}; the vocabulary has {vocab_size:,} tokens")
        return int(value)

    def strings(self, key: str, most: int) -> list[str]:
        value = self.values.get(key)
        if value is None:
            raise self.error(key, "is missing")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"is {_shown(value)}; it must be an array of strings")
        if len(value) > most:
            raise self.error(key, f"has {len(value):,} entries; the limit is {most:,}")
        return value

    def numbers(self, key: str, length: int | None, kinds: str) -> np.ndarray | None:
        """An array of `length` numbers whose NumPy kind is one of `kinds`; None without the key."""
        value = self.values.get(key)
        if value is None:
            return None
        array = np.asarray(value) if isinstance(value, Sequence | np.ndarray) else np.asarray(None)
        if array.ndim != 1 or array.dtype.kind not in kinds:
            raise self.error(key, f"is {_shown(value)}; it must be an array of numbers")
        if length is not None and len(array) != length:
            raise self.error(key, f"has {len(array):,} entries; the vocabulary has {length:,} tokens")
        return array


def _shown(value: Any) -> str:
    """A short, one-line form of any value."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    if isinstance(value, list | tuple):
        kinds = {type(item).__name__ for item in value[:1000]}
        return f"an array of {' and '.join(sorted(kinds)) or 'nothing'}"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
