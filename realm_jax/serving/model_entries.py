"""`[[models]]` of a `serve.toml`: which models a server has, under which names, and how each runs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from realm_jax.config import EngineConfig
from realm_jax.errors import RequestError
from realm_jax.serving.tenants import shortened

MAX_MODELS = 64
MAX_NAMES = 256
OF_THE_PROCESS = ("threads", "device", "memory", "offline")
"""Fields of `EngineConfig` that all models share, and the command line says."""
OPTIONS = tuple(f.name for f in fields(EngineConfig) if f.name not in OF_THE_PROCESS)
OWN = ("name", "aliases", "model", "draft_model", "adapters", "preload")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True)
class ModelEntry:
    """A model to serve. names: the first is shown; model, draft_model: references; options: `EngineConfig`'s.

    fold: adapters that become part of it, with their scales. preload: whether it is loaded at the start.
    """

    names: tuple[str, ...]
    model: str | Path | None
    draft_model: str | Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=lambda: MappingProxyType({}))
    fold: tuple[tuple[Path, float], ...] = ()
    preload: bool = False
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def check_names(entries: tuple[ModelEntry, ...]) -> None:
    """Raises RequestError for what is no name, and for one that two models or adapters have."""
    seen: set[str] = set()
    for entry in entries:
        for name in (*entry.names, *entry.adapters):
            if _checked("name", name) in seen:
                raise RequestError(f"{name!r} names two models or adapters; give one of them another name")
            seen.add(name)


def default_name(reference: str | Path) -> str:
    """What a model is called: a file without its folders and ending, a reference as it is."""
    path = Path(reference)
    return path.stem if path.suffix == ".gguf" and ":" not in str(path) else str(path)


def read_models(given: object, folder: Path) -> tuple[ModelEntry, ...]:
    """The models of a file in that folder. Raises RequestError that names the model and the field."""
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise RequestError("models must be tables: [[models]] for each")
    if len(given) > MAX_MODELS:
        raise RequestError(f"models has {len(given):,}; the most is {MAX_MODELS}")
    entries = []
    for i, each in enumerate(given):
        try:
            entries.append(_entry(each, folder))
        except RequestError as error:
            raise RequestError(f"models[{i}]: {error}") from error
    check_names(tuple(entries))
    return tuple(entries)


def _entry(given: dict[str, Any], folder: Path) -> ModelEntry:
    if unknown := sorted(given.keys() - {*OWN, *OPTIONS}):
        raise RequestError(f"unknown field {unknown[0][:64]!r}; known: {', '.join((*OWN, *OPTIONS))}")
    if "model" not in given:
        raise RequestError("model is missing; give a path, a known name, or hf:owner/repo/file.gguf")
    model = _reference("model", given["model"], folder)
    draft = None if "draft_model" not in given else _reference("draft_model", given["draft_model"], folder)
    names = (given.get("name", default_name(model)), *_list("aliases", given.get("aliases", [])))
    preload = given.get("preload", False)
    if not isinstance(preload, bool):
        raise RequestError(f"preload is {shortened(preload)}; give true or false")
    options = {name: value for name, value in given.items() if name in OPTIONS}
    EngineConfig.from_options(**options)  # refused here if one is wrong
    return ModelEntry(
        names,
        model,
        draft,
        MappingProxyType(_adapters(given.get("adapters", {}), folder)),
        preload=preload,
        options=MappingProxyType(options),
    )


def _reference(name: str, given: object, folder: Path) -> str | Path:
    """A known name or an address as it is, a path from the folder."""
    if not isinstance(given, str) or not given or "\0" in given or len(given) > 4096:
        raise RequestError(f"{name} is {shortened(given)}; give a path, a known name or hf:...")
    if given.startswith("hf:") or ("/" not in given and not given.endswith(".gguf")):
        return given
    return folder / Path(given).expanduser()


def _adapters(given: object, folder: Path) -> dict[str, Path]:
    if not isinstance(given, dict) or len(given) > MAX_NAMES:
        raise RequestError(f'adapters must be a table of at most {MAX_NAMES}: {{ poet = "poet.gguf" }}')
    found = {}
    for name, path in given.items():
        if not isinstance(path, str) or not path or "\0" in path or len(path) > 4096:
            raise RequestError(f"adapters.{name[:64]} is {shortened(path)}; give a path")
        found[name] = folder / Path(path).expanduser()
    return found


def _list(name: str, given: object) -> list[Any]:
    if not isinstance(given, list) or len(given) > MAX_NAMES:
        raise RequestError(f"{name} is {shortened(given)}; give a list of at most {MAX_NAMES} names")
    return given


def _checked(field: str, name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == "*":
        raise RequestError(f"{field} is {shortened(name)}; a name has 1 to 256 characters and no spaces")
    return name
