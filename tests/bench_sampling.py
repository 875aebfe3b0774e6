"""Milliseconds that `sample` takes for 16 rows, best of several, on a model's real logits, as JSON.

The larger vocabulary is the model's own, and copies of it 6 and 8 below: as peaked, with a longer tail.
`wide`: of the 16 rows, those whose truncated distribution has over 256 tokens, which take the longest.
"""

import json
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from sampling_oracle import compiled, unseen

from realm_jax import LLM, SamplingParams
from realm_jax.sampling import CANDIDATES
from realm_jax.sampling_rows import SamplingRows

ROWS = 16
LARGER = 151_936
TEXT = (
    "In the spring of 1911 the expedition reached the coast. Its leader wrote that nobody had slept, and "
    "that the dogs, the ships and even the instruments seemed tired. What they found there was a small "
    "village whose people spoke of a mountain, of two rivers and of a road that no map had ever shown. "
    "He asked them how far it was; they answered that the question made no sense, because the road was "
    "shorter in winter."
)
CASES = {
    "greedy": SamplingParams(temperature=0),
    "greedy, logprobs": SamplingParams(temperature=0, logprobs=5),
    "temperature 0.8, top_p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
    "temperature 0.8, top_k 40, top_p 0.95, min_p 0.05": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.95, min_p=0.05
    ),
    "temperature 1, top_k 40": SamplingParams(top_k=40),
    "temperature 1, top_k 400": SamplingParams(top_k=400),
    "temperature 1": SamplingParams(),
    "temperature 1, repetition_penalty 1.1": SamplingParams(repetition_penalty=1.1),
}


def real_logits(model: str | None) -> np.ndarray:
    """float32 [T, V] of every position of a text, the first few left out."""
    llm = LLM(model)
    return llm.logits(llm.tokenizer.encode(TEXT))[8:].astype(np.float32)


def wide_rows(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """[T]: whether top_p alone keeps more tokens than there are candidates."""
    mass = np.exp((logits - logits.max(-1, keepdims=True)) / (p.temperature or 1))
    best = np.partition(mass, -CANDIDATES, axis=-1)[:, -CANDIDATES:]
    is_open = p.temperature > 0 and not 0 < p.top_k <= CANDIDATES and p.min_p == 0
    return is_open & (best.sum(-1) < p.top_p * mass.sum(-1))


def milliseconds(logits: np.ndarray, params: SamplingParams, repeats: int = 15) -> float:
    vocab = logits.shape[1]
    one = SamplingRows.of(params, seed=1, sample_index=0, stop_ids=(), prompt=0, vocab=vocab)
    rows = jax.tree.map(lambda x: jnp.repeat(x, ROWS, axis=0), one)
    x, counts = jnp.asarray(logits), unseen(ROWS, vocab)
    active = jnp.ones(ROWS, jnp.bool_)
    taken = []
    for i in range(repeats + 2):
        positions = jnp.full(ROWS, 100 + i, jnp.int32)
        start = time.perf_counter()
        jax.block_until_ready(compiled(x, rows, counts, positions, active))
        taken.append(time.perf_counter() - start)
    return min(taken[2:]) * 1e3


def main() -> None:
    every = real_logits(sys.argv[1] if len(sys.argv) > 1 else None)
    copies = [every - drop for drop in (0, 6, 8, 8)]
    larger = np.concatenate(copies, axis=1)[:, :LARGER]
    figures = {}
    for logits in (every, larger):
        found = {}
        for name, params in CASES.items():
            wide = wide_rows(logits, params)
            order = np.argsort(wide, kind="stable")
            narrowest, widest = logits[order[:ROWS]], logits[order[-ROWS:]]
            found[name] = {
                "narrow_ms": round(milliseconds(narrowest, params), 2),
                "wide_ms": round(milliseconds(widest, params), 2),
                "wide": [int(wide[order[:ROWS]].sum()), int(wide[order[-ROWS:]].sum())],
                "wide_share": round(float(wide.mean()), 3),
            }
        figures[str(logits.shape[1])] = found
    print(json.dumps({"rows": ROWS, "cores": os.cpu_count(), "vocab": figures}, indent=1))


if __name__ == "__main__":
    main()
