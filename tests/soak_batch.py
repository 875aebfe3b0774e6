"""Random requests answered alone and together, over many models: prints how many differ (none may)."""

import argparse
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

from test_engine import mixed_requests, said

from realm_jax import LLM

ARCHITECTURES = (
    "llama-moe",
    "llama-rope-yarn",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "phi3-longrope",
)


def differing(llm: LLM, seed: int, count: int) -> int:
    """How many of `count` random requests say something else among others, in another order, than alone."""
    rng = random.Random(seed)
    prompts, params = mixed_requests(seed, count)
    limit = llm.model.context - 30
    prompts = [prompt[:limit] for prompt in prompts]
    params = [replace(p, logprobs=rng.choice([None, 0, 5])) for p in params]
    alone = [said(llm.generate([p], q)[0]) for p, q in zip(prompts, params, strict=True)]
    order = rng.sample(range(count), count)
    together = llm.generate([prompts[i] for i in order], [params[i] for i in order])
    return sum(said(output) != alone[i] for i, output in zip(order, together, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=40)
    options = parser.parse_args()
    folder = Path(os.environ["REALM_FIXTURES"]) / "arch"
    cases = [(name, folder / name / "model.gguf") for name in ARCHITECTURES] + [("default model", None)]
    total = 0
    for name, path in cases:
        for dtype in ("float32", "bfloat16"):
            llm = LLM(path, dtype=dtype, ctx_size=256 if path else 1024, max_num_seqs=16)
            wrong = sum(differing(llm, seed, options.requests) for seed in range(options.rounds))
            total += wrong
            requests = options.rounds * options.requests
            print(
                json.dumps({"model": name, "dtype": dtype, "requests": requests, "differ": wrong}), flush=True
            )
    sys.exit(bool(total))


if __name__ == "__main__":
    main()
