"""What people write to name a model, read into what it means."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from realm_jax.errors import RequestError
from realm_jax.gguf.checkpoint import is_checkpoint
from realm_jax.hub.sources import HuggingFaceFile, Source, WheelMember

DEFAULT_MODEL = "smollm2-135m-instruct"
HF_FORM = "hf:owner/repo/file.gguf[@revision]"
_NAME = r"[A-Za-z0-9_][\w.-]*"
_HF = re.compile(rf"hf:({_NAME}/{_NAME})/([^@\\]+\.gguf)(?:@([\w][\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class KnownModel:
    """A model that has a name here: its file, verified by checksum, and where the file comes from."""

    name: str
    file: str
    licence: str  # SPDX identifier
    size: int  # bytes
    sha256: str
    sources: tuple[Source, ...]  # in the order in which they are tried


@cache
def known_models() -> dict[str, KnownModel]:
    """Every model of ``configs/models.toml``, by name."""
    text = (resources.files("realm_jax") / "configs" / "models.toml").read_text("utf-8")
    return {name: _known_model(name, table) for name, table in tomllib.loads(text).items()}


def _known_model(name: str, table: dict[str, Any]) -> KnownModel:
    facts = {key: value for key, value in table.items() if key != "sources"}
    return KnownModel(name=name, **facts, sources=tuple(_source(**entry) for entry in table["sources"]))


def _source(kind: str, **entry: Any) -> Source:
    kinds = {"huggingface": HuggingFaceFile, "pypi": WheelMember}
    return kinds[kind](**entry)


def parse(reference: str | Path | None) -> Path | KnownModel | HuggingFaceFile:
    """The file, the known model or the Hugging Face file that the reference names; None is the default model.

    A path is that of an existing file. Raises `RequestError`.
    """
    if reference is None:
        return known_models()[DEFAULT_MODEL]
    if isinstance(reference, Path):
        return _local(reference)
    if reference in known_models() and not Path(reference).is_file():
        return known_models()[reference]
    if reference.startswith("hf:"):
        return _hugging_face(reference)
    if "://" in reference:
        raise RequestError(
            f"model is {reference!r}; an address is not a reference (pass {HF_FORM}, or a path)"
        )
    looks_like_path = "/" in reference or "\\" in reference or reference.endswith(".gguf")
    if reference and (looks_like_path or reference in (".", "..") or Path(reference).exists()):
        return _local(Path(reference))
    names = ", ".join(known_models())
    raise RequestError(
        f"unknown model {reference!r} (pass a path to a .gguf file, {HF_FORM}, or one of: {names})"
    )


def _local(path: Path) -> Path:
    path = path.expanduser()
    try:
        if path.is_file():
            return path
        if path.is_dir():
            return _folder(path)
        if path.exists():
            raise RequestError(f"model is not a regular file: {path}")
    except (OSError, ValueError) as error:  # a name too long, a null byte
        raise RequestError(f"model path {str(path)[:200]!r} is not usable: {error}") from error
    raise RequestError(f"model file not found: {path} (a file on Hugging Face is written {HF_FORM})")


def _folder(path: Path) -> Path:
    """The folder, if it is a checkpoint; whether it is whole is seen when it is opened."""
    if is_checkpoint(path):
        return path
    if (path / "config.json").is_file():
        raise RequestError(
            f"model is a folder of Hugging Face's form: {path} (realm convert hf makes it a file)"
        )
    raise RequestError(f"model is a folder: {path} (pass the .gguf file in it; the first one if split)")


def _hugging_face(reference: str) -> HuggingFaceFile:
    match = _HF.fullmatch(reference)
    if match is None or not reference.isprintable():
        raise RequestError(f"model is {reference!r}; the form is {HF_FORM}")
    repo, file, revision = match.groups()
    steps = [*repo.split("/"), *file.split("/"), *(revision or "main").split("/")]
    if any(step in ("", ".", "..") for step in steps):
        raise RequestError(f"model is {reference!r}; no part between slashes may be empty, '.' or '..'")
    return HuggingFaceFile(repo, file, revision or "main")
