"""Decode speed of the default model against a program of its matrix products alone, as JSON.

Rows alternate in one run: for 1, 16 and 32 sequences, greedy and sampled steps of the whole engine, and the
products alone with as many rows. Medians over rounds; ratios pair by pair. The share of scheduling is the
time of a step in which the host decides and books, of the whole.
"""

import argparse
import json
import time
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from realm_jax import LLM, SamplingParams
from realm_jax.config import MIN_ROWS

STEPS = 64
PROMPT = "Write a long story about a fox who travels the world by train, and describe what it sees."
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=STEPS + 1, ignore_eos=True, seed=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=STEPS + 1, ignore_eos=True)


@jax.jit
def products(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Every product of a step on rows x, each depending on the one before."""
    layers = sum(name.startswith("layer_") for name in params)
    for i in range(layers):
        attention, mlp = params[f"layer_{i}"]["attention"], params[f"layer_{i}"]["mlp"]
        width = x.shape[1]
        heads = (x @ attention["qkv"]["kernel"])[:, : attention["out"]["kernel"].shape[0]]
        x = x + heads @ attention["out"]["kernel"]
        x = x + (x @ mlp["gate_up"]["kernel"])[:, : mlp["down"]["kernel"].shape[0]] @ mlp["down"]["kernel"]
        assert x.shape[1] == width
    return x @ params["head"]


def step_seconds(llm: LLM, sequences: int, params: SamplingParams) -> float:
    """Seconds a decode step takes, host work included, all sequences running."""
    ids = llm.tokenizer.encode(PROMPT)
    prompts = [[*ids, *llm.tokenizer.encode(f" Part {i}.")] for i in range(sequences)]
    many = [SamplingParams(**{**params.__dict__, "seed": i}) for i in range(sequences)]
    requests = [llm._request(prompt, one) for prompt, one in zip(prompts, many, strict=True)]
    for request in requests:
        llm.engine.add_request(request)
    ready: set[str] = set()
    while len(ready) < sequences:  # until each has its first token
        ready |= {delta.request_id for delta in llm.engine.step()}
    start, steps = time.perf_counter(), 0
    while steps < STEPS - sequences:
        llm.engine.step()
        steps += 1
    jax.block_until_ready(llm.engine._runner._states)
    seconds = (time.perf_counter() - start) / steps
    for request in requests:
        llm.engine.abort(request.id)
    while llm.engine.has_work:
        llm.engine.step()
    return seconds


def scheduling_share(llm: LLM, sequences: int) -> float:
    """Of the time of decode steps, the part that the scheduler and the transcripts take."""
    spent, engine = 0.0, llm.engine
    originals = engine.scheduler.schedule, engine._deltas

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            result = function(*arguments)
            spent += time.perf_counter() - start
            return result

        return call

    engine.scheduler.schedule, engine._deltas = (timed(function) for function in originals)
    try:
        seconds = step_seconds(llm, sequences, GREEDY) * (STEPS - sequences)
    finally:
        engine.scheduler.schedule, engine._deltas = originals
    return spent / seconds


def product_seconds(llm: LLM, rows: int) -> float:
    x = jnp.ones((max(rows, MIN_ROWS), llm.model.config.hidden_size), jnp.float32)
    jax.block_until_ready(products(llm.model.params, x))
    start = time.perf_counter()
    jax.block_until_ready([products(llm.model.params, x) for _ in range(STEPS)])
    return (time.perf_counter() - start) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    llm = LLM(dtype=options.dtype, ctx_size=1024, max_num_seqs=32)
    cases = {
        "greedy_1": lambda: step_seconds(llm, 1, GREEDY),
        "products_1": lambda: product_seconds(llm, 1),
        "greedy_16": lambda: step_seconds(llm, 16, GREEDY),
        "sampled_16": lambda: step_seconds(llm, 16, SAMPLED),
        "products_16": lambda: product_seconds(llm, 16),
        "greedy_32": lambda: step_seconds(llm, 32, GREEDY),
        "products_32": lambda: product_seconds(llm, 32),
    }
    for case in cases.values():
        case()  # compiles
    rounds = [{name: case() for name, case in cases.items()} for _ in range(options.rounds)]

    def ratio(a: str, b: str) -> float:
        return round(median(r[a] / r[b] for r in rounds), 3)

    figures = {
        "dtype": options.dtype,
        "jax": jax.__version__,
        "milliseconds_a_step": {name: round(median(r[name] for r in rounds) * 1e3, 2) for name in cases},
        "tokens_per_second_1": round(1 / median(r["greedy_1"] for r in rounds), 1),
        "tokens_per_second_16": round(16 / median(r["greedy_16"] for r in rounds), 1),
        "tokens_per_second_32": round(32 / median(r["greedy_32"] for r in rounds), 1),
        "scheduling_share_32": round(scheduling_share(llm, 32), 4),
        "step_rate_against_products_1": ratio("products_1", "greedy_1"),
        "step_rate_against_products_16": ratio("products_16", "greedy_16"),
        "step_rate_against_products_32": ratio("products_32", "greedy_32"),
        "sampled_against_greedy_16": ratio("greedy_16", "sampled_16"),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
