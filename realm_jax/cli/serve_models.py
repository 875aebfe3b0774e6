"""Which models `realm serve` has: of its flags, and of a file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from realm_jax.cli.options import EngineFlags, adapters
from realm_jax.errors import RequestError
from realm_jax.hub.references import DEFAULT_MODEL
from realm_jax.serving.model_entries import ModelEntry, check_names, default_name
from realm_jax.serving.server.model_loader import ModelLoader
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.pooled_model import PooledModel

OWN = ("model", "lora", "draft_model", "memory")
"""Flags that are not options of every model."""


def served_models(
    flags: EngineFlags,
    config: dict[str, Any],
    added: Sequence[str],
    of_file: Sequence[ModelEntry],
    names: Sequence[str] | None,
    *,
    warmup: bool,
) -> list[PooledModel]:
    """The model of -m, or the default one if nothing else says any; those of --add-model; those of the file.

    One alone is loaded when the server starts. config: further fields of `EngineConfig`.
    Raises RequestError for flags of -m where there is none, and for a name that two have.
    """
    entries = [*map(_added, added), *of_file]
    if flags.model is not None or not entries:
        entries.insert(0, _of_flags(flags, names))
    else:
        _refuse_flags_of_model(flags, names)
    check_names(tuple(entries))
    options = {f.name: getattr(flags, f.name) for f in dataclasses.fields(flags) if f.name not in OWN}
    return [
        PooledModel(
            ModelNames(entry.names),
            ModelLoader(entry, options | config, warmup),
            dict(entry.adapters),
            preload=entry.preload or len(entries) == 1,
        )
        for entry in entries
    ]


def _added(value: str) -> ModelEntry:
    name, _, reference = value.partition("=")
    if not name or not reference:
        raise RequestError(f"--add-model is {value!r}; give NAME=REF, such as big=big.gguf")
    return ModelEntry((name,), reference)


def _of_flags(flags: EngineFlags, names: Sequence[str] | None) -> ModelEntry:
    chosen = adapters(flags.lora)
    return ModelEntry(
        tuple(names or [default_name(flags.model or DEFAULT_MODEL)]),
        flags.model,
        flags.draft_model,
        chosen["lora"],
        tuple(chosen["fold"]),
    )


def _refuse_flags_of_model(flags: EngineFlags, names: Sequence[str] | None) -> None:
    given = {"--lora": flags.lora, "--draft-model": flags.draft_model, "--served-model-name": names}
    for name, value in given.items():
        if value:
            raise RequestError(f"{name} is of the model of -m, which is not given (say it in the file)")
