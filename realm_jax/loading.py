"""A GGUF file on disk -> a model ready to run."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from realm_jax import gguf, runtime, weights
from realm_jax.architectures import read_config
from realm_jax.chat import ChatTemplate
from realm_jax.config import EngineConfig, ModelConfig
from realm_jax.tokenizer import Tokenizer
from realm_jax.weights import Params

LoadProgress = Callable[[int, int], None]  # bytes of weights read, bytes in total


@dataclass(frozen=True)
class LoadedModel:
    """All that a file gives: facts, weights, tokenizer and chat template."""

    path: Path
    config: ModelConfig
    metadata: dict[str, Any]
    params: Params
    tokenizer: Tokenizer
    template: ChatTemplate | None
    context: int
    dtype: str
    kv_dtype: str
    seconds: float

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises UnsupportedError if the file has none."""
        return self.template or ChatTemplate.require(self.metadata, self.path.name)


def load_model(path: Path, config: EngineConfig, on_progress: LoadProgress | None = None) -> LoadedModel:
    """The model in the file, its weights on the device.

    Raises ModelFileError for a broken file, UnsupportedError for what is not served, RequestError for a
    configuration that does not fit the model.
    """
    start = time.perf_counter()
    dtype, kv_dtype = runtime.resolve_dtype(config)
    with gguf.open(path) as file:
        model = read_config(file.metadata, path.name)
        tokenizer = Tokenizer.from_metadata(file.metadata, path.name)
        template = ChatTemplate.from_metadata(file.metadata, path.name, **_special_texts(tokenizer))
        context = config.context_for(model)
        params = weights.load(file, model, dtype=dtype, context=context, progress=_counter(file, on_progress))
        metadata = file.metadata
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    return LoadedModel(path, model, metadata, params, tokenizer, template, context, dtype, kv_dtype, seconds)


def _special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of special tokens, as templates name them."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.unk_id,
        "pad_token": tokenizer.pad_id,
    }
    return {name: "" if token is None else tokenizer.token_text(token) for name, token in ids.items()}


def _counter(file: gguf.GGUFFile, on_progress: LoadProgress | None) -> weights.Progress | None:
    if on_progress is None:
        return None
    total, done = sum(tensor.nbytes for tensor in file.tensors.values()), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        on_progress(done, total)

    return count
