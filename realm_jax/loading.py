"""A GGUF file on disk -> a model ready to run."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from realm_jax import gguf, lora, runtime, weights
from realm_jax.architectures import read_config
from realm_jax.buckets import Buckets
from realm_jax.cache import cached_bytes
from realm_jax.chat import TEMPLATE_KEY, ChatTemplate
from realm_jax.config import EngineConfig, ModelConfig, Numerics
from realm_jax.errors import CapacityError, UnsupportedError
from realm_jax.lora import Adapter, Base, FoldedFile
from realm_jax.model import Transformer
from realm_jax.parallel import Placement, place
from realm_jax.recurrent_cache import state_bytes
from realm_jax.tokenizer import Tokenizer
from realm_jax.tools import Toolset, ToolUse, find_tool_use, has_calls
from realm_jax.weights import Params

TOOL_TEMPLATE = "tool_use"
"""Some files have a template of this name for conversations with tools."""

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

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], tools: Toolset | None = None, **variables: Any
    ) -> str:
        """A conversation as the model reads it, up to where it answers. variables: for the template.

        Raises UnsupportedError for tools, or calls of them, where the template ignores such.
        """
        if tools is None and not has_calls(messages):
            return self.require_template().render(messages, **variables)
        return self.require_tools().render(messages, tools, **variables)

    def require_tools(self) -> ToolUse:
        """How it is told of tools. Raises UnsupportedError if its template ignores them."""
        if isinstance(self._tool_use, UnsupportedError):
            raise UnsupportedError(str(self._tool_use))
        return self._tool_use

    @cached_property
    def _tool_use(self) -> ToolUse | UnsupportedError:
        key, texts = f"{TEMPLATE_KEY}.{TOOL_TEMPLATE}", _special_texts(self.tokenizer)
        name = TOOL_TEMPLATE if key in self.metadata else None
        own = ChatTemplate.from_metadata(self.metadata, self.path.name, name=name, **texts)
        return find_tool_use((own, self.template), self.path.name)


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
        spare = _spare(folded, model, config, numerics)
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


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a model comes to hold: its weights, and the caches of all pools once they are used.

    What a call computes with, and the sampler's counts, come on top.
    """

    weights: int
    caches: int
    context: int

    def left_of(self, memory: int) -> int:
        """What so many bytes leave. Raises CapacityError where they are too few."""
        if (left := memory - self.weights - self.caches) >= 0:
            return left
        raise CapacityError(
            f"weights take {self.weights / 1e6:,.1f} MB and the caches up to {self.caches / 1e6:,.1f} MB; "
            f"memory is {memory / 1e6:,.1f} MB (raise --memory, or lower --ctx-size, now {self.context:,})"
        )


def plan_memory(file: FoldedFile, model: ModelConfig, config: EngineConfig, numerics: Numerics) -> MemoryPlan:
    """What the model would hold. Raises UnsupportedError where nobody can say."""
    if config.tensor_parallel > 1:
        raise UnsupportedError(
            f"--memory counts one device and mesh is {config.mesh!r}; set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    if runtime.backend() != "cpu":
        raise UnsupportedError(
            f"--memory is for --device cpu; on {runtime.backend()} set XLA_PYTHON_CLIENT_MEM_FRACTION"
        )
    context = config.context_for(model)
    buckets = Buckets.plan(context, config)
    caches = buckets.cached_tokens * cached_bytes(model, numerics.kv_dtype)
    caches += sum(pool.slots for pool in buckets.pools) * state_bytes(model)
    return MemoryPlan(weights.planned_bytes(file, model, numerics), caches, context)


def _spare(file: FoldedFile, model: ModelConfig, config: EngineConfig, numerics: Numerics) -> int | None:
    """What weights and caches leave of `config.memory`; None where that is no limit."""
    if config.memory is None:
        return None
    return plan_memory(file, model, config, numerics).left_of(config.memory)


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
