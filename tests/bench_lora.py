"""What adapters cost in a batch, as JSON: total tokens per second, and ratios to an engine without adapters.

Two engines of the same model: one has never seen an adapter, the other has 8 of random numbers for all
projections of all layers. Kinds of batches alternate in one run: without adapters on both engines, each
sequence with one of the 8 in turn, all with the same one, and half of the sequences with one. Medians over
rounds of the ratios to the first kind in the same round.
"""

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import jax
import numpy as np

from realm_jax import LLM, SamplingParams
from realm_jax.lora import Adapter, LowRank
from realm_jax.serving.request import Request

PROMPT = 128


def random_adapter(llm: LLM, seed: int, rank: int) -> Adapter:
    """Small changes of every projection of the layers."""
    rng = np.random.default_rng(seed)
    deltas = {
        name: LowRank(
            rng.standard_normal((rank, shape[1]), np.float32),
            rng.standard_normal((shape[0], rank), np.float32),
            0.01 / rank,
        )
        for name, shape in llm.model.base.shapes.items()
        if name.startswith("blk.") and len(shape) == 2
    }
    return Adapter(f"random-{seed}", deltas)


def rates(llm: LLM, adapters: Sequence[str | None], steps: int, number: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decode, one sequence for each entry of `adapters`."""
    rng = np.random.default_rng(number)
    params = SamplingParams(temperature=0, max_tokens=steps + 8, ignore_eos=True)
    requests = [
        Request(
            f"bench-{number}-{i}",
            tuple(map(int, rng.integers(100, 10_000, PROMPT))),
            params,
            seed=0,
            adapters=() if name is None else ((name, 1.0),),
        )
        for i, name in enumerate(adapters)
    ]
    start = time.perf_counter()
    for request in requests:
        llm.engine.add_request(request)
    ready: set[str] = set()
    while len(ready) < len(requests):
        ready |= {delta.request_id for delta in llm.engine.step()}
    middle = time.perf_counter()
    for _ in range(steps):
        llm.engine.step()
    jax.block_until_ready(llm.engine._runner._states)
    end = time.perf_counter()
    for request in requests:
        llm.engine.abort(request.id)
    while llm.engine.has_work:
        llm.engine.step()
    return len(requests) * PROMPT / (middle - start), len(requests) * steps / (end - middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    options: dict[str, Any] = {"max_num_seqs": given.sequences, "ctx_size": 512, "prefix_caching": False}
    plain = LLM(given.model, **options)
    loaded = LLM(given.model, max_loras=given.adapters, **options)
    names = [f"adapter-{i}" for i in range(given.adapters)]
    for i, name in enumerate(names):
        loaded.engine.load_adapter(name, random_adapter(loaded, i, given.rank))
    N = given.sequences
    kinds = {
        "no adapters loaded": (plain, [None] * N),
        "loaded, none named": (loaded, [None] * N),
        "each one of all": (loaded, [names[i % len(names)] for i in range(N)]),
        "all the same": (loaded, names[:1] * N),
        "half with one": (loaded, [names[i // 2 % len(names)] if i % 2 else None for i in range(N)]),
    }
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for number in range(given.rounds + 1):
        for kind, (llm, adapters) in kinds.items():
            result = rates(llm, adapters, given.steps, number)
            if number:  # the first compiles
                found[kind].append(result)
    first = next(iter(kinds))
    rows = [
        {
            "requests": kind,
            **{
                f"{what}_{measure}": round(median(values), 3)
                for place, what in enumerate(("prefill", "decode"))
                for measure, values in (
                    ("tokens_per_second", [each[place] for each in rounds]),
                    ("ratio", [a[place] / b[place] for a, b in zip(rounds, found[first], strict=True)]),
                )
            },
        }
        for kind, rounds in found.items()
    ]
    print(json.dumps({**vars(given), "numerics": str(plain.model.numerics), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
