"""realm_jax's side of bench_cpu: a worker."""

import gc
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bench_models
import jax
from bench_workers import serve

from realm_jax import LLM, CapacityError, SamplingParams
from realm_jax.benchmark import RandomPrompts, TextGeneration, head_start, time_generation, time_prompts
from realm_jax.buckets import Buckets
from realm_jax.config import TILE, EngineConfig

MOST = 4096  # slots that are tried to have `sequences` of the wanted length


class Ours:
    """One model in realm_jax."""

    def __init__(self) -> None:
        self._llm: LLM | None = None
        self._prompts: RandomPrompts | None = None
        self._how: dict[str, Any] = {}
        self._path = ""

    def facts(self) -> dict[str, str]:
        """Versions."""
        return {"jax": jax.__version__, "python": platform.python_version()}

    def prepare(self, name: str) -> dict[str, Any]:
        """Where the model's file is; `quantize`: what has to be done first to have it."""
        match bench_models.model_file(name):
            case bench_models.Requantized(source, path, file_type):
                return {"quantize": {"source": str(source), "target": str(path), "file_type": file_type}}
            case path:
                return {
                    "path": str(path),
                    "bytes": path.stat().st_size,
                    "tensor_bytes": bench_models.tensor_types(path),
                }

    def load(self, path: str, threads: int, config: dict[str, Any]) -> float:
        """Seconds that the file takes to be an engine; the one before is gone."""
        self._how, self._path = {"threads": threads, "device": "cpu", **config}, path
        return self._load(ctx_size=TILE, max_num_seqs=1)

    def open(self, sequences: int, tokens: int) -> dict[str, Any]:
        """So many sequences of so many tokens run at once. Returns the flags."""
        margin = head_start([TextGeneration(1, TILE, sequences)])
        shape = _engine_shape(sequences, tokens + margin, self._how)
        self._load(**shape)
        return {**self._how, **shape, "resolved": asdict(self._model.model.numerics)}

    def draw(self, count: int, length: int) -> list[list[int]]:
        """Prompts of ordinary tokens, no two of which begin alike."""
        assert self._prompts is not None
        return self._prompts.draw(count, length)

    def logits(self, prompt: list[int]) -> list[float]:
        return self._model.logits(prompt)[-1].tolist()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to the token that follows the prompt."""
        return time_prompts(self._model.engine, [prompt])

    def fill(self, prompts: list[list[int]], common: int) -> None:
        """What the prompts have in common at their beginning is in the cache, if that is a tile or more."""
        if common >= TILE:
            self._model.generate([prompts[0]], SamplingParams(temperature=0, max_tokens=1))

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """All sequences generate, each after its prompt."""
        sample = time_generation(self._model.engine, prompts, tokens)
        return {"tokens": sample.tokens, "seconds": sample.seconds}

    def profile(self, prompts: list[list[int]], steps: int) -> dict[str, Any]:
        """Where the time of decode steps after the prompts goes; with 0 steps, that of the prompts."""
        import bench_profile

        return bench_profile.attribute(self._model.engine, prompts, steps)

    def _load(self, ctx_size: int, max_num_seqs: int) -> float:
        self._llm = self._prompts = None
        gc.collect()
        start = time.perf_counter()
        self._llm = LLM(Path(self._path), ctx_size=ctx_size, max_num_seqs=max_num_seqs, **self._how)
        jax.block_until_ready(self._llm.model.params)
        seconds = time.perf_counter() - start
        self._prompts = RandomPrompts(self._llm, 0)
        return seconds

    @property
    def _model(self) -> LLM:
        assert self._llm is not None, "no model is loaded"
        return self._llm


def _engine_shape(sequences: int, tokens: int, how: dict[str, Any]) -> dict[str, int]:
    """The least max_num_seqs with which so many sequences of so many tokens run at once."""
    tokens = math.ceil(tokens / TILE) * TILE
    for count in range(sequences, MOST):
        config = EngineConfig(**{**how, "ctx_size": tokens, "max_num_seqs": count})
        if Buckets.plan(tokens, config).pools[-1].slots >= sequences:
            return {"ctx_size": tokens, "max_num_seqs": count}
    raise CapacityError(f"{sequences} sequences of {tokens:,} tokens do not run at once (lower --batch)")


if __name__ == "__main__":
    serve(Ours())
