"""Tokens per second: prompt processing and text generation, for a number of sequences at once."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from realm_jax.benchmark.workload import Clock, Prompts, greedy, settle
from realm_jax.errors import RequestError
from realm_jax.serving.engine import Engine
from realm_jax.serving.request import DraftMetrics


@dataclass(frozen=True)
class PromptProcessing:
    """`batch` prompts at once, each of `tokens` new tokens after `depth` others."""

    tokens: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        return f"pp{self.tokens}"


@dataclass(frozen=True)
class TextGeneration:
    """`batch` sequences at once, each of `tokens` new tokens after `depth` others."""

    tokens: int
    depth: int
    batch: int

    @property
    def name(self) -> str:
        return f"tg{self.tokens}"


Test = PromptProcessing | TextGeneration


@dataclass(frozen=True)
class Sample:
    """One repetition: tokens of the whole batch, and the seconds they took."""

    tokens: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """A test and its throughput, total over the batch."""

    test: str
    depth: int
    batch: int
    tokens_per_second: float
    stddev: float
    samples: tuple[Sample, ...]
    drafts: DraftMetrics | None = None  # None where nothing guesses

    @classmethod
    def of(cls, test: Test, samples: Sequence[Sample], drafts: DraftMetrics | None = None) -> "Row":
        """The rate at a token's mean time; stddev is the same share of it as that time's own is of the mean.

        Raises RequestError where the mean is not positive: the test drowns in the noise.
        """
        each = [sample.seconds / sample.tokens for sample in samples]
        mean = fmean(each)
        if mean <= 0:
            raise RequestError(
                f"{test.name} after {test.depth:,} tokens cannot be measured: prompts with and without its "
                "tokens take the same time (raise -p or -r)"
            )
        deviation = stdev(each) / mean**2 if len(each) > 1 else 0.0
        return cls(test.name, test.depth, test.batch, 1 / mean, deviation, tuple(samples), drafts)

    def json(self) -> dict[str, Any]:
        """The row as one JSON object."""
        found = asdict(self)
        del found["drafts"]
        return found if self.drafts is None else found | {"drafts": self.drafts.json()}


def time_prompts(engine: Engine, prompts: Prompts, clock: Clock = time.perf_counter) -> float:
    """Seconds from adding the prompts to the first token of each."""
    requests = greedy(prompts, max_tokens=1)
    waiting = {request.id for request in requests}
    start = clock()
    for request in requests:
        engine.add_request(request)
    while waiting:
        waiting -= {delta.request_id for delta in engine.step() if delta.output is not None}
    return clock() - start


def time_generation(
    engine: Engine, prompts: Prompts, tokens: int, clock: Clock = time.perf_counter
) -> Sample:
    """What was read from the moment that all sequences had a token until each had `tokens` more.

    Raises RequestError if one came to the context's end before it had them. Where guesses help some more than
    others, these may end before the others have theirs.
    """
    requests = greedy(prompts, max_tokens=None)
    have, before, ended = Counter({request.id: 0 for request in requests}), Counter[str](), set[str]()

    def read() -> None:
        if any(have[name] - before[name] < tokens for name in ended):
            raise RequestError(
                f"{len(requests)} sequences do not get {tokens:,} tokens together: one came to the "
                "context's end first (raise --ctx-size, or lower -b, -n or -d)"
            )
        for delta in engine.step():
            have[delta.request_id] += len(delta.token_ids)
            if delta.output is not None:
                ended.add(delta.request_id)

    try:
        for request in requests:
            engine.add_request(request)
        while not all(have.values()):
            read()
        before, start = have.copy(), clock()
        while any(have[name] - before[name] < tokens for name in have):
            read()
        return Sample(have.total() - before.total(), clock() - start)
    finally:
        for request in requests:
            engine.abort(request.id)
        settle(engine, prompts[0][0])
