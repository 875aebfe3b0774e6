"""A safetensors file from outside: its header is checked before the library sees it.

Layout: a u64 length, that many bytes of JSON (name -> dtype, shape, data_offsets), the data. The library
refuses offsets and sizes that do not fit, but takes the last of two equal names, and headers up to 100 MB.
"""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.fitting import shown

MAX_HEADER = 16 << 20
FLOATS = ("F32", "F16", "BF16", "F64")
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]


class SafetensorsFile:
    """An open file: `entries`, and the values of each as float32."""

    def __init__(self, path: Path) -> None:
        """Raises ModelFileError for a broken file, UnsupportedError for one that holds other than floats."""
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.entries = _entries(path)
        try:
            self._open = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ModelFileError(f"{path.name}: {shown(str(error))}") from None

    def values(self, name: str) -> np.ndarray:
        with np.errstate(over="ignore"):  # a float64 beyond float32 is infinite, which is refused by name
            return self._open.get_tensor(name).astype(np.float32)

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Some rows of a matrix or values of a vector, as float32; only they are read."""
        import ml_dtypes  # noqa: F401  # the library asks NumPy for bfloat16 by name

        with np.errstate(over="ignore"):
            return self._open.get_slice(name)[first : first + count].astype(np.float32)


def is_pickle(path: Path) -> bool:
    """Whether the file begins as torch.save's do, whatever its name."""
    with path.open("rb") as file:
        start = file.read(9)
    # the low bytes of a safetensors header's length may be anything; its text begins after them
    return start[8:] != b"{" and start.startswith((ZIP, PICKLE))


def refuse_pickle(path: Path) -> NoReturn:
    raise ModelFileError(
        f"{path.name}: is a pickle, which can run any code when it is opened; it is not read "
        "(save the adapter again as safetensors)"
    )


def _entries(path: Path) -> dict[str, Entry]:
    """The header's tensors, whose names are unique."""
    try:
        if is_pickle(path):
            refuse_pickle(path)
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            (length,) = struct.unpack("<Q", start.ljust(8, b"\0"))
            if len(start) < 8 or length > size - 8:
                raise ModelFileError(f"{path.name}: header length is {length:,}; the file has {size:,} bytes")
            if length > MAX_HEADER:
                raise ModelFileError(f"{path.name}: header length is {length:,}; the limit is {MAX_HEADER:,}")
            header = file.read(length)
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from None
    return {name: _entry(path, name, value) for name, value in _object(path, header).items()}


def _object(path: Path, header: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ModelFileError(f"{path.name}: {shown(twice)} stands twice in the header")
        return found

    try:
        values = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path.name}: no safetensors header: {shown(str(error))}") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path.name}: the header is no JSON object")
    values.pop("__metadata__", None)
    return values


def _entry(path: Path, name: str, value: Any) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype, shape = fields.get("dtype"), fields.get("shape")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
        raise ModelFileError(f"{path.name}: {shown(name)} has no dtype and shape")
    if dtype not in FLOATS:
        raise UnsupportedError(
            f"{path.name}: {shown(name)} is {shown(dtype)}; supported: {', '.join(FLOATS)}"
        )
    return Entry(dtype, tuple(shape))
