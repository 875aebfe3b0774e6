"""Latency under an arrival rate: an open loop, whose requests come whether or not the engine keeps up."""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from realm_jax.benchmark.workload import Clock, Prompts, greedy
from realm_jax.serving.engine import Engine


@dataclass(frozen=True)
class Load:
    """Requests that arrive at random, `rate` a second on average, and what counts as served well.

    first_within, each_within: seconds to the first token, and on average to each after it.
    """

    rate: float
    requests: int
    prompt: int
    tokens: int
    first_within: float
    each_within: float

    def arrivals(self, seed: int) -> list[float]:
        """Seconds at which the requests come, the first at 0: a Poisson process."""
        gaps = np.random.default_rng(seed).exponential(1 / self.rate, self.requests - 1)
        return [0.0, *np.cumsum(gaps).tolist()]


@dataclass(frozen=True)
class Percentiles:
    """Of a list of seconds, linear between neighbours."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Percentiles":
        """The percentiles of a list that is not empty."""
        return cls(*np.percentile([*seconds], (50, 90, 99)).tolist())


@dataclass(frozen=True)
class Latency:
    """How a load was served, in seconds. goodput: requests a second that were served well."""

    load: Load
    first_token: Percentiles
    between_tokens: Percentiles | None  # None where each request was one token
    end_to_end: Percentiles
    tokens: int
    seconds: float
    goodput: float

    @classmethod
    def of(cls, load: Load, arrivals: Sequence[float], times: Sequence[Sequence[float]]) -> "Latency":
        """times: for each request, when each of its tokens was read, on the clock of the arrivals."""
        waits = [mine[0] - arrival for mine, arrival in zip(times, arrivals, strict=True)]
        gaps = [np.diff(mine).tolist() for mine in times]
        well = sum(
            wait <= load.first_within and (not between or fmean(between) <= load.each_within)
            for wait, between in zip(waits, gaps, strict=True)
        )
        seconds = max(mine[-1] for mine in times)
        every = [*itertools.chain(*gaps)]
        return cls(
            load=load,
            first_token=Percentiles.of(waits),
            between_tokens=Percentiles.of(every) if every else None,
            end_to_end=Percentiles.of(mine[-1] - at for mine, at in zip(times, arrivals, strict=True)),
            tokens=sum(map(len, times)),
            seconds=seconds,
            goodput=well / seconds,
        )

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def requests_per_second(self) -> float:
        return self.load.requests / self.seconds

    def json(self, batch: int) -> dict[str, Any]:
        """One JSON object with the keys that rows of throughput have, and its own."""
        return {
            "test": "latency",
            "depth": 0,
            "batch": batch,
            "tokens_per_second": self.tokens_per_second,
            "stddev": 0.0,
            "requests_per_second": self.requests_per_second,
            **asdict(self),
        }


def time_load(
    engine: Engine, load: Load, prompts: Prompts, *, seed: int, clock: Clock = time.perf_counter
) -> Latency:
    """The requests, one for each prompt, were added as they came and served to their ends."""
    arrivals = load.arrivals(seed)
    requests = greedy(prompts, max_tokens=load.tokens)
    times: dict[str, list[float]] = {request.id: [] for request in requests}
    pending, start = deque(zip(arrivals, requests, strict=True)), clock()
    while pending or engine.has_work:
        while pending and pending[0][0] <= clock() - start:
            engine.add_request(pending.popleft()[1])
        if not engine.has_work:
            time.sleep(max(pending[0][0] - (clock() - start), 0.0))
            continue
        deltas = engine.step()
        now = clock() - start
        for delta in deltas:
            times[delta.request_id] += [now] * len(delta.token_ids)
    return Latency.of(load, arrivals, list(times.values()))
