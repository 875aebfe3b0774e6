"""JSON files from outside: their values are read with the type and the bounds that each must have."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realm_jax.errors import ModelFileError
from realm_jax.lora.fitting import shown

MAX_BYTES = 16 << 20  # an index of 90,000 tensors has 9 MB
MAX_TOKENIZER = 64 << 20  # the largest tokenizer.json that is in use has 33 MB
HALF = re.compile(r"\\u[dD][89a-fA-F]")  # how JSON spells halves of characters, mostly in pairs


@dataclass(frozen=True)
class Fields:
    """The values of one object; null is the same as absent. defaults: what an absent one means."""

    values: Mapping[str, Any]
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def error(self, key: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {key} {problem}")

    def get(self, key: str) -> Any:
        value = self.values.get(key)
        return self.defaults.get(key) if value is None else value

    def has(self, key: str) -> bool:
        return self.get(key) is not None

    def count(self, key: str, most: int, *, least: int = 1, default: int | None = None) -> int:
        """A whole number in the bounds."""
        value = default if (found := self.get(key)) is None else found
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, f"is {_shown(value)}; it must be from {least} to {most:,}")
        return value

    def real(self, key: str, *, default: float | None = None) -> float:
        """A positive number that float32 holds."""
        value = default if (found := self.get(key)) is None else found
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 <= value <= 1e30:
            raise self.error(key, f"is {_shown(value)}; it must be a positive number")
        return float(value)

    def reals(self, key: str, length: int) -> list[float]:
        """So many positive numbers."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) != length:
            raise self.error(key, f"is {_shown(value)}; it must be {length} positive numbers")
        return [Fields({key: each}, self.source).real(key) for each in value]

    def flag(self, key: str, default: bool) -> bool:
        value = default if (found := self.get(key)) is None else found
        if not isinstance(value, bool):
            raise self.error(key, f"is {_shown(value)}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = default if (found := self.get(key)) is None else found
        if not isinstance(value, str):
            raise self.error(key, f"is {_shown(value)}; it must be a string")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; absent = none."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.error(key, f"is {_shown(value)}; it must be a list of strings")
        return value

    def objects(self, key: str) -> "list[Fields]":
        """A list of objects; absent = none."""
        value = self.get(key) or []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self.error(key, f"is {_shown(value)}; it must be a list of objects")
        return [Fields(each, f"{self.source}: {key}") for each in value]

    def section(self, key: str) -> "Fields | None":
        """An object within; None where there is none."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {_shown(value)}; it must be an object")
        return Fields(value, f"{self.source}: {key}")


def read_text(path: Path, most: int = MAX_BYTES) -> str:
    """The file's text. Raises ModelFileError for one that has more bytes than `most`, or is no UTF-8."""
    try:
        if not path.is_file():  # a pipe would wait for ever, a device never end
            raise ModelFileError(f"{path}: is no file")
        if (size := path.stat().st_size) > most:
            raise ModelFileError(f"{path.name}: has {size:,} bytes; the limit is {most:,}")
        return path.read_text("utf-8")
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path.name}: is not UTF-8 at byte {error.start}") from None


def read_object(path: Path, *, required: bool = True, most: int = MAX_BYTES) -> Fields:
    """The JSON object in the file of at most so many bytes; an empty one where an optional file is absent."""
    if not required and not path.exists():
        return Fields({}, path.name)
    text = read_text(path, most)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path.name}: no JSON: {shown(str(error))}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path.name}: is no JSON object")
    if HALF.search(text):
        _check_whole(path, value)
    return Fields(value, path.name)


def _check_whole(path: Path, value: Any) -> None:
    """No text within has half of a character, which no file can hold as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ModelFileError(
            f"{path.name}: has half of a character, \\u{ord(error.object[error.start]):x}, in a text"
        ) from None


def _shown(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = (
        ascii(value) if not isinstance(value, list | dict) else f"a {type(value).__name__} of {len(value):,}"
    )
    return "absent" if value is None else text if len(text) <= 60 else text[:57] + "..."
