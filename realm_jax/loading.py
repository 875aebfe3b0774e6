"""A GGUF file on disk -> a model ready to run."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from realm_jax import gguf, lora, runtime, weights
from realm_jax.architectures import read_config
from realm_jax.buckets import Buckets
from realm_jax.cache import cached_bytes
from realm_jax.chat import ChatTemplate
from realm_jax.config import EngineConfig, ModelConfig, Numerics
from realm_jax.errors import CapacityError, UnsupportedError
from realm_jax.lora import Adapter, Base, FoldedFile
from realm_jax.model import Transformer
from realm_jax.parallel import Placement, place
from realm_jax.recurrent_cache import state_bytes
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
    numerics: Numerics
    placement: Placement
    base: Base  # what adapters must fit
    folded: tuple[tuple[Adapter, float], ...]
    spare: int | None  # bytes of `config.memory` that weights and caches leave; None = no limit
    seconds: float

    @property
    def transformer(self) -> Transformer:
        """The model, computed where its weights stand."""
        return self.placement.transformer(self.config)

    def require_template(self) -> ChatTemplate:
        """The chat template. Raises UnsupportedError if the file has none."""
        return self.template or ChatTemplate.require(self.metadata, self.path.name)


def load_model(
    path: Path,
    config: EngineConfig,
    on_progress: LoadProgress | None = None,
    fold: Sequence[tuple[Path, float]] = (),
) -> LoadedModel:
    """The model in the file, its weights on the device or devices, changed by the adapters to fold.

    fold: files of adapters, and what the change of each is multiplied by.
    Raises ModelFileError for a broken file, UnsupportedError for what is not served, RequestError for a
    configuration that does not fit the model, CapacityError where it may need more than `config.memory`.
    """
    start = time.perf_counter()
    numerics, placement = runtime.resolve_numerics(config), place(config)
    with gguf.open(path) as file:
        model = read_config(file)
        tokenizer = Tokenizer.from_metadata(file.metadata, path.name)
        template = ChatTemplate.from_metadata(file.metadata, path.name, **_special_texts(tokenizer))
        placement.local(model)  # refused here where it cannot be divided
        context = config.context_for(model)
        base = Base.of(file, model)
        adapters = tuple((lora.read(each, base), scale) for each, scale in fold)
        folded = FoldedFile(file, adapters)
        spare = _check_budget(folded, model, config, context, numerics)
        params = weights.load(
            folded,
            model,
            numerics=numerics,
            context=context,
            placement=placement,
            threads=config.threads,
            progress=_counter(folded, on_progress),
        )
        metadata = file.metadata
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    return LoadedModel(
        path=path,
        config=model,
        metadata=metadata,
        params=params,
        tokenizer=tokenizer,
        template=template,
        context=context,
        numerics=numerics,
        placement=placement,
        base=base,
        folded=adapters,
        spare=spare,
        seconds=seconds,
    )


def _check_budget(
    file: FoldedFile, model: ModelConfig, config: EngineConfig, context: int, numerics: Numerics
) -> int | None:
    """Weights and the caches of all pools fit into `config.memory`; returns what they leave of it.

    What a call computes with, and the sampler's counts, come on top.
    """
    if config.memory is None:
        return None
    if config.tensor_parallel > 1:
        raise UnsupportedError(
            f"--memory counts one device and mesh is {config.mesh!r}; set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    if runtime.backend() != "cpu":
        raise UnsupportedError(
            f"--memory is for --device cpu; on {runtime.backend()} set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    buckets = Buckets.plan(context, config)
    caches = buckets.cached_tokens * cached_bytes(model, numerics.kv_dtype)
    caches += sum(pool.slots for pool in buckets.pools) * state_bytes(model)
    planned = weights.planned_bytes(file, model, numerics)
    if planned + caches > config.memory:
        raise CapacityError(
            f"weights take {planned / 1e6:,.1f} MB and the caches up to {caches / 1e6:,.1f} MB; memory is "
            f"{config.memory / 1e6:,.1f} MB (raise --memory, or lower --ctx-size, now {context:,})"
        )
    return config.memory - planned - caches


def _special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """The texts of special tokens, as templates name them."""
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.unk_id,
        "pad_token": tokenizer.pad_id,
    }
    return {name: "" if token is None else tokenizer.token_text(token) for name, token in ids.items()}


def _counter(file: FoldedFile, on_progress: LoadProgress | None) -> weights.Progress | None:
    if on_progress is None:
        return None
    total, done = sum(tensor.nbytes for tensor in file.tensors.values()), 0
    one_at_a_time = threading.Lock()  # tensors are read by several threads

    def count(nbytes: int) -> None:
        nonlocal done
        with one_at_a_time:
            done += nbytes
            on_progress(done, total)

    return count
