"""Where a command writes: what cannot be is refused before the work, not after it."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.gguf import GGUFFile


def require_writable(path: Path, inputs: Iterable[Path] = ()) -> None:
    """A file can be made at the path, and takes the place of none of the inputs.

    Raises RequestError for a folder, a device, a folder that is not there, or an input.
    """
    if path.is_dir() or not path.name:
        raise RequestError(f"{path} is a folder; give a file in it, such as {path / 'model.gguf'}")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is no regular file; give another path")
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"{path}: the folder {path.parent} cannot be written; give another path")
    if path.exists() and any(each.exists() and path.samefile(each) for each in inputs):
        raise RequestError(f"{path} is what is read, and would be overwritten; give another path")


def files_of(file: "GGUFFile") -> list[Path]:
    """The files of an open model: its parts, or all of a checkpoint's folder."""
    return [*file.split_paths, *(file.path.rglob("*") if file.path.is_dir() else ())]
