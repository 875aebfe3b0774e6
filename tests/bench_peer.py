"""realm_jax and llama.cpp on the same GGUF and the same token ids, in turn in one process, as JSON.

Throughput is measured as `realm bench` does; medians over rounds, ratios (ours to theirs) pair by pair.
--mixed N instead: N prompts of mixed length as a batch job of ours with 32 at once, through llama.cpp with
16 at once, batched continuously as llama-server does, and one by one through `LLM.generate`.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

OURS_AT_ONCE, THEIRS_AT_ONCE = 32, 16
BATCH, THEIRS, ALONE = "realm_jax_batch", "llama_cpp", "realm_jax_one_by_one"
PROMPT, GENERATED = (20, 400), (16, 128)  # the range of lengths in --mixed
CHECKED, CHECKED_TOKENS = 4, 32  # prompts whose logits are compared first
PAUSE = 0.05  # seconds; threads of the one that ran last spin a while before they sleep

if importlib.util.find_spec("llama_cpp") is None:
    sys.exit("error: llama_cpp is not installed: pip install llama-cpp-python")

import numpy as np  # noqa: E402
from llama_peer import Job, LlamaPeer  # noqa: E402

from realm_jax import LLM, SamplingParams, hub  # noqa: E402
from realm_jax import benchmark as ours  # noqa: E402
from realm_jax.serving.batch import BatchJob  # noqa: E402


def seconds(task: Callable[[], object]) -> float:
    """How long the task takes."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def open_ours(options: argparse.Namespace, path: Path, context: int, max_num_seqs: int) -> LLM:
    llm = LLM(
        path,
        ctx_size=context,
        max_num_seqs=max_num_seqs,
        threads=options.threads,
        dtype=options.dtype,
        weights=options.weights,
        kv_dtype=options.kv_dtype,
    )
    llm.engine.warmup()
    return llm


def open_theirs(options: argparse.Namespace, path: Path, tokens: int, sequences: int) -> LlamaPeer:
    return LlamaPeer(
        path, sequences=sequences, tokens=tokens, threads=options.threads, unified=options.kv_unified
    )


def agreement(llm: LLM, peer: LlamaPeer, prompts: list[list[int]]) -> float:
    """The least correlation of both sides' logits after a prompt: the same model gives nearly 1."""
    found = [np.corrcoef(llm.logits(ids)[-1], peer.logits(ids))[0, 1] for ids in prompts]
    return round(float(min(found)), 5)


def compare(test: ours.Test, llm: LLM, peer: LlamaPeer, prompts: ours.RandomPrompts) -> tuple[float, float]:
    """Tokens per second of both on the same prompts: ours, theirs."""
    match test:
        case ours.PromptProcessing():
            batch = prompts.draw(test.batch, test.tokens)
            mine = test.batch * test.tokens / ours.time_prompts(llm.engine, batch)
            theirs = test.batch * test.tokens / seconds(lambda: peer.prefill(batch))
        case ours.TextGeneration():
            batch = prompts.draw(test.batch, 1)
            sample = ours.time_generation(llm.engine, batch, test.tokens)
            mine = sample.tokens / sample.seconds
            first = peer.prefill(batch)
            theirs = test.batch * test.tokens / seconds(lambda: peer.generate(first, 1, test.tokens))
    peer.clear()
    time.sleep(PAUSE)
    return mine, theirs


def throughput(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Rows of pp and tg for each batch size."""
    tests: list[ours.Test] = [
        kind(tokens, 0, batch)
        for batch in options.b
        for kind, tokens in ((ours.PromptProcessing, options.p), (ours.TextGeneration, options.n))
        if tokens
    ]
    context = ours.required_context(tests) + ours.head_start(tests)
    llm = open_ours(options, path, context, max(options.b))
    prompts, rows, same = ours.RandomPrompts(llm, options.seed), [], None
    for test in tests:
        peer = open_theirs(options, path, context, test.batch)
        if same is None:
            same = agreement(llm, peer, prompts.draw(CHECKED, CHECKED_TOKENS))
        compare(test, llm, peer, prompts)  # not counted
        rounds = [compare(test, llm, peer, prompts) for _ in range(options.rounds)]
        rows.append(
            {
                "test": test.name,
                "batch": test.batch,
                "realm_jax": round(median(mine for mine, _ in rounds), 1),
                "llama_cpp": round(median(theirs for _, theirs in rounds), 1),
                "ratio": round(median(mine / theirs for mine, theirs in rounds), 3),
            }
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
        peer.close()
    return {"unit": "tokens/s", "rows": rows, "logit_correlation": same}


def write_jobs(jobs: list[Job], path: Path) -> None:
    """The jobs as `realm batch` reads them."""
    lines = (
        {"id": str(i), "prompt": job.prompt, "max_tokens": job.tokens, "temperature": 0, "ignore_eos": True}
        for i, job in enumerate(jobs)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_batch_job(llm: LLM, jobs: list[Job], source: Path) -> None:
    """The jobs through `realm batch`'s own code, files included."""
    progress = BatchJob(llm, source, source.with_suffix(".out")).run()
    if progress.errors or progress.tokens != sum(len(job.prompt) + job.tokens for job in jobs):
        sys.exit(f"error: the batch job went wrong: {progress}")


def run_one_by_one(llm: LLM, jobs: list[Job]) -> None:
    for job in jobs:
        llm.generate(job.prompt, SamplingParams(temperature=0, max_tokens=job.tokens, ignore_eos=True))


def mixed_round(llm: LLM, peer: LlamaPeer, draw: Callable[[], list[Job]]) -> dict[str, float]:
    """Total tokens per second of the three ways. Ours get new prompts each time: none can be reused."""
    with tempfile.TemporaryDirectory() as folder:
        jobs, others, source = draw(), draw(), Path(folder) / "in.jsonl"
        write_jobs(jobs, source)
        ways: dict[str, Callable[[], object]] = {
            BATCH: lambda: run_batch_job(llm, jobs, source),
            THEIRS: lambda: peer.serve(jobs, THEIRS_AT_ONCE),
            ALONE: lambda: run_one_by_one(llm, others),
        }
        tokens = sum(len(job.prompt) + job.tokens for job in jobs)
        return {way: tokens / seconds(task) for way, task in ways.items()}


def mixed(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """Total tokens per second, prompts included, of the three ways to do jobs of mixed length."""
    context = PROMPT[1] + GENERATED[1]
    llm = open_ours(options, path, context, OURS_AT_ONCE)
    peer = open_theirs(options, path, context, THEIRS_AT_ONCE)
    rng, prompts = np.random.default_rng(options.seed), ours.RandomPrompts(llm, options.seed)
    lengths = [rng.integers(*of, options.mixed, endpoint=True).tolist() for of in (PROMPT, GENERATED)]

    def draw() -> list[Job]:
        return [Job(prompts.draw(1, p)[0], n) for p, n in zip(*lengths, strict=True)]

    same = agreement(llm, peer, prompts.draw(CHECKED, CHECKED_TOKENS))
    rounds = []
    for _ in range(options.rounds):
        rounds.append(mixed_round(llm, peer, draw))
        print(json.dumps(rounds[-1]), file=sys.stderr)
    peer.close()
    return {
        "unit": "tokens/s, prompts included",
        "jobs": options.mixed,
        "prompt_tokens": sum(lengths[0]),
        "generated_tokens": sum(lengths[1]),
        **{way: round(median(each[way] for each in rounds), 1) for way in (BATCH, THEIRS, ALONE)},
        "batch_to_llama_cpp": round(median(each[BATCH] / each[THEIRS] for each in rounds), 3),
        "batch_to_one_by_one": round(median(each[BATCH] / each[ALONE] for each in rounds), 3),
        "logit_correlation": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model", metavar="REF", help="as in realm; default: its default model")
    parser.add_argument("-p", type=int, default=512, metavar="N", help="prompt tokens; 0 = no such test")
    parser.add_argument("-n", type=int, default=64, metavar="N", help="generated tokens; 0 = no such test")
    parser.add_argument("-b", type=numbers, default=(1, 16, 32), metavar="N[,N]", help="sequences at once")
    parser.add_argument("--mixed", type=int, metavar="N", help="jobs of mixed length instead")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="of both")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--kv-unified", action="store_true", help="llama.cpp: one cache for all sequences")
    for name in ("--dtype", "--weights", "--kv-dtype"):
        parser.add_argument(name, default="auto", help="ours, as in realm")
    options = parser.parse_args()
    path, load = hub.resolve(options.model), os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the load average is {load:.1f}; others' work slows one side more", file=sys.stderr)
    figures = throughput(options, path) if options.mixed is None else mixed(options, path)
    facts = {
        "model": path.name,
        "threads": options.threads,
        "rounds": options.rounds,
        "load_average_before": round(load, 2),
        "llama_cpp_python": importlib.metadata.version("llama-cpp-python"),
    }
    print(json.dumps(facts | figures))


if __name__ == "__main__":
    main()
