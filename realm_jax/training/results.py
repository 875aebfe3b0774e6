"""What a training leaves, and what makes two trainings the same."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from realm_jax.errors import RequestError
from realm_jax.gguf.checkpoint import standing_for
from realm_jax.loading import LoadedModel
from realm_jax.lora.export import write_gguf, write_peft
from realm_jax.training.data import Example, Reader
from realm_jax.training.settings import TrainingConfig
from realm_jax.training.trainer import Trainer


def fingerprint(
    model: LoadedModel, examples: Sequence[Example], reader: Reader, config: TrainingConfig
) -> dict[str, Any]:
    """What decides the losses, as JSON: a training continues only the same one."""
    settings = asdict(config)
    del settings["save_every"]
    facts = {
        "model": f"{model.path.name}, {standing_for(model.path).stat().st_size:,} bytes",
        "device": jax.default_backend(),
        "context": reader.context,
        "drops_long": reader.drops_long,
        **{name: getattr(model.numerics, name) for name in ("dtype", "weights", "kernels")},
        **settings,
        "data": _digest(examples),
    }
    return json.loads(json.dumps(facts))  # as it is read back: lists for tuples


def _digest(examples: Sequence[Example]) -> str:
    """What is learned, not the text that it is made of: a template may render another date each day."""
    found = hashlib.sha256()
    for example in examples:
        found.update(f"{len(example.ids)}\0".encode() + example.ids.tobytes() + example.is_target.tobytes())
    return found.hexdigest()[:16]


def write_adapter(trainer: Trainer, model: LoadedModel, folder: Path) -> Path:
    """The folder has adapter.gguf, whose path is returned, the same as peft/, and training.json.

    Raises RequestError where these cannot be written.
    """
    history, path = trainer.history, folder / "adapter.gguf"
    facts = {"settings": asdict(trainer.config), **asdict(history)}
    adapter = trainer.adapter(folder.absolute().name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_gguf(adapter, model.base, path)
        write_peft(adapter, model.base, folder / "peft")
        (folder / "training.json").write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    except OSError as error:
        raise RequestError(f"{error.filename or folder}: {error.strerror}") from error
    return path
