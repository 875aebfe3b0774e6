"""Throughput and latency of a model, measured through the engine that serves.

- pp (prompt processing): `batch` prompts of random tokens, from adding them to the first token of each.
  After a depth d it is the time of prompts of d + N tokens less that of prompts of d tokens.
- tg (text generation): `batch` sequences after prompts of d tokens (one, if d is 0). The clock starts when
  the last of them has its first token, and stops when each has N more; every token read in between
  counts. Sequences that started first are deeper by the steps they made while the others were prefilled.
- latency: requests arrive at random moments (a Poisson process) whether or not the engine keeps up, and
  the time that one waits to be let in counts as its own.

No two prompts begin with the same token while the vocabulary lasts: no cache of prefixes can help.
"""

import os
import time
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

from realm_jax import gguf, runtime
from realm_jax.benchmark.latency import Latency, Load, Percentiles, time_load
from realm_jax.benchmark.throughput import (
    PromptProcessing,
    Row,
    Sample,
    Test,
    TextGeneration,
    time_generation,
    time_prompts,
)
from realm_jax.benchmark.workload import Clock, RandomPrompts
from realm_jax.config import BLOCK
from realm_jax.llm import LLM


class Benchmark:
    """Measures one model, all of whose programs are compiled before anything is timed."""

    def __init__(self, llm: LLM, *, seed: int = 0, clock: Clock = time.perf_counter) -> None:
        self._engine, self._seed, self._clock = llm.engine, seed, clock
        self._prompts = RandomPrompts(llm, seed)
        self._engine.warmup()

    def measure(self, test: Test, repetitions: int) -> Row:
        """The test's throughput over the repetitions, after one that does not count."""
        self._sample(test)
        before = self._engine.drafts
        samples = [self._sample(test) for _ in range(repetitions)]
        after = self._engine.drafts
        return Row.of(test, samples, None if before is None or after is None else after.since(before))

    def measure_latency(self, load: Load) -> Latency:
        """How a load was served, after one request that does not count."""
        self._prompt_seconds(load.prompt, 1)
        prompts = self._prompts.draw(load.requests, load.prompt)
        return time_load(self._engine, load, prompts, seed=self._seed, clock=self._clock)

    def _sample(self, test: Test) -> Sample:
        match test:
            case PromptProcessing():
                seconds = self._prompt_seconds(test.depth + test.tokens, test.batch)
                before = self._prompt_seconds(test.depth, test.batch) if test.depth else 0.0
                return Sample(test.batch * test.tokens, seconds - before)
            case TextGeneration():
                prompts = self._prompts.draw(test.batch, max(test.depth, 1))
                return time_generation(self._engine, prompts, test.tokens, self._clock)

    def _prompt_seconds(self, length: int, batch: int) -> float:
        return time_prompts(self._engine, self._prompts.draw(batch, length), self._clock)


def required_context(tests: Iterable[Test | Load]) -> int:
    """Tokens of the longest prompt, the most that are generated and the largest depth together."""
    prompt = tokens = 1
    depth = 0
    for test in tests:
        match test:
            case PromptProcessing():
                prompt, depth = max(prompt, test.tokens), max(depth, test.depth)
            case TextGeneration():
                tokens, depth = max(tokens, test.tokens), max(depth, test.depth)
            case Load():
                prompt, tokens = max(prompt, test.prompt), max(tokens, test.tokens)
    return prompt + tokens + depth


def head_start(tests: Iterable[Test | Load]) -> int:
    """Tokens that a first sequence may have before the last has one: two steps for a block of each prompt."""
    return max(
        (2 * t.batch * (1 + t.depth // BLOCK) for t in tests if isinstance(t, TextGeneration)), default=0
    )


def setup(llm: LLM) -> dict[str, Any]:
    """The columns of llama-bench that all rows of a run have in common; size is in bytes."""
    nbytes = Counter[str]()
    with gguf.open(llm.model.path) as file:
        for tensor in file.tensors.values():
            nbytes[tensor.ggml_type.name] += tensor.nbytes
        params = sum(prod(tensor.shape) for tensor in file.tensors.values())
    parts = (
        llm.model.config.architecture,
        llm.model.metadata.get("general.size_label"),
        nbytes.most_common(1)[0][0],
    )
    return {
        "model": " ".join(str(part) for part in parts if part),
        "size": nbytes.total(),
        "params": params,
        "backend": runtime.backend(),
        "threads": llm.engine_config.threads or os.cpu_count(),
        "type_k": llm.model.numerics.kv_dtype,
        "type_v": llm.model.numerics.kv_dtype,
    }


__all__ = [
    "Benchmark",
    "Latency",
    "Load",
    "Percentiles",
    "PromptProcessing",
    "RandomPrompts",
    "Row",
    "Sample",
    "Test",
    "TextGeneration",
    "head_start",
    "required_context",
    "setup",
    "time_generation",
    "time_load",
    "time_prompts",
]
