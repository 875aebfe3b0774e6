"""Files to a model that is served."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realm_jax import hub, memory
from realm_jax.config import EngineConfig
from realm_jax.llm import LLM
from realm_jax.serving.model_entries import ModelEntry
from realm_jax.serving.server.logs import LoggedProgress, event


@dataclass(frozen=True)
class ModelLoader:
    """Loads a model, as `Loader` says.

    options: fields of `EngineConfig`, where the entry says nothing else. warmup: whether all programs are
    compiled while it loads, so that no request waits for that.
    """

    entry: ModelEntry
    options: Mapping[str, Any] = field(default_factory=dict)
    warmup: bool = False

    @property
    def is_local(self) -> bool:
        """Whether its files are here. Raises RequestError for a reference that names nothing."""
        references = (self.entry.model, *self._drafts)
        return all(hub.cached_path(reference) is not None for reference in references)

    def needed_bytes(self, adapters: Mapping[str, Path], memory_limit: int) -> int:
        """What it needs, of files that are fetched if they are not here. Raises as `memory.needed_bytes`."""
        config = EngineConfig.from_options(**self._options(memory_limit))
        draft = next((hub.resolve(each, offline=config.offline) for each in self._drafts), None)
        return memory.needed_bytes(
            hub.resolve(self.entry.model, offline=config.offline),
            config,
            draft=draft,
            adapters=adapters.values(),
            fold=self.entry.fold,
        )

    def load(self, adapters: Mapping[str, Path], memory_limit: int | None) -> LLM:
        """The model, ready to generate."""
        progress = LoggedProgress(self.entry.names[0])
        llm = LLM(
            self.entry.model,
            draft_model=self.entry.draft_model,
            lora=adapters,
            fold=self.entry.fold,
            on_load=progress.loading,
            on_compile=progress.compiling,
            on_notice=progress.notice,
            **self._options(memory_limit),
        )
        progress.loaded()
        if self.warmup:
            event("warmed up", model=self.entry.names[0], programs=llm.engine.warmup())
        return llm

    @property
    def _drafts(self) -> tuple[str | Path, ...]:
        return () if self.entry.draft_model is None else (self.entry.draft_model,)

    def _options(self, memory_limit: int | None) -> dict[str, Any]:
        return {**self.options, **self.entry.options, "memory": memory_limit}
