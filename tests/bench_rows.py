"""The rows of bench_cpu: what is measured of one model, both sides in turn."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_workers import Worker, WorkerError, run_process

TESTS = ("load", "prefill", "ttft", "decode", "process")
OURS, THEIRS = "realm_jax", "llama_cpp"
TAIL = 64  # tokens at the end of a context in which the sequences differ
SHORT = 16  # tokens of the prompt whose first token is waited for
CHECKED, CHECKED_TOKENS = 4, 32  # prompts whose logits are compared
LEAST_CORRELATION = 0.95  # below it the two do not compute the same model
PROFILED_STEPS = 16
PROMPT, ANSWER = "Write a long story about a fox who travels the world by train.", 32
HERE = Path(__file__).parent

Measured = dict[str, float]  # side -> what it took


@dataclass
class Sides:
    """Both workers, or ours alone, and what they said of themselves."""

    ours: Worker
    theirs: Worker | None
    options: argparse.Namespace
    flags: dict[str, Any] = field(default_factory=dict)
    correlation: float | None = None

    def ask(self, task: str, **arguments: Any) -> dict[str, Any]:
        """What each side answers, one after the other."""
        workers = {OURS: self.ours} | ({THEIRS: self.theirs} if self.theirs else {})
        return {name: worker.ask(task, **arguments) for name, worker in workers.items()}

    def load(self, path: str) -> Measured:
        """Seconds of each to load the file."""
        threads, config = self.options.threads, dict(self.options.engine_config)
        took = {OURS: self.ours.ask("load", path=path, threads=threads, config=config)}
        if self.theirs is not None:
            unified = self.options.kv_unified
            took[THEIRS] = self.theirs.ask("load", path=path, threads=threads, unified=unified)
        return took

    def open(self, name: str, sequences: int, tokens: int) -> None:
        """Both have room for so many sequences of so many tokens."""
        self.flags[name] = self.ask("open", sequences=sequences, tokens=tokens)

    def close(self) -> None:
        """Both processes have ended."""
        self.ours.close()
        if self.theirs is not None:
            self.theirs.close()


def measure(sides: Sides, path: str) -> Iterator[dict[str, Any]]:
    """The rows of a model's file that the options ask for."""
    options, tests = sides.options, sides.options.tests
    size = Path(path).stat().st_size
    if "process" in tests:  # before the workers hold memory
        yield from _process(sides, path)
    if set(tests) == {"process"}:
        return
    sides.load(path)  # not counted: starts the device, fills the page cache
    if "load" in tests:
        took = _rounds(options, lambda: sides.load(path))
        yield _row("load", "MB/s", took, lambda seconds: size / 1e6 / seconds, bytes=size)
    sides.open("prefill", 1, max((*options.prefill, SHORT, CHECKED_TOKENS)) + 1)
    _check_same(sides)
    for tokens in options.prefill if "prefill" in tests else ():
        took = _rounds(options, lambda n=tokens: _prefill(sides, n))
        yield _row("prefill", "tokens/s", took, lambda s, n=tokens: n / s, tokens=tokens)
    if "ttft" in tests:
        took = _rounds(options, lambda: _prefill(sides, SHORT))
        yield _row("ttft", "ms", took, lambda s: s * 1e3, tokens=SHORT)
    if "decode" in tests:
        for depth in options.depth:
            yield from _decode(sides, depth)


def _decode(sides: Sides, depth: int) -> Iterator[dict[str, Any]]:
    """A row for each number of sequences."""
    options, tokens = sides.options, sides.options.n
    flags = {OURS: sides.ours.ask("open", sequences=max(options.batch), tokens=depth + tokens + 1)}
    for batch in options.batch:
        if sides.theirs is not None:
            flags[THEIRS] = sides.theirs.ask("open", sequences=batch, tokens=depth + tokens + 1)
        prompts, common = _contexts(sides, batch, depth)
        sides.ask("fill", prompts=prompts, common=common)

        def once(prompts: list[list[int]] = prompts) -> Measured:
            said = sides.ask("decode", prompts=prompts, tokens=tokens)
            return {name: each["seconds"] / each["tokens"] for name, each in said.items()}

        took = _rounds(options, once)
        yield _row("decode", "tokens/s", took, lambda s: 1 / s, tokens=tokens, sequences=batch, depth=depth)
    sides.flags[f"decode after {depth}"] = flags


def _contexts(sides: Sides, count: int, depth: int) -> tuple[list[list[int]], int]:
    """Prompts that differ at their ends alone, and how much they have in common: both sides copy that."""
    common = max(depth - TAIL, 0)
    start = sides.ours.ask("draw", count=1, length=common)[0] if common else []
    ends = sides.ours.ask("draw", count=count, length=depth - common)
    return [start + end for end in ends], common


def _prefill(sides: Sides, tokens: int) -> Measured:
    """Seconds of each for a prompt that is new to both."""
    prompt = sides.ours.ask("draw", count=1, length=tokens)[0]
    return sides.ask("prefill", prompt=prompt)


def _check_same(sides: Sides) -> None:
    """Both sides' logits after some prompts agree. Raises WorkerError where they do not."""
    if sides.theirs is None:
        return
    prompts = sides.ours.ask("draw", count=CHECKED, length=CHECKED_TOKENS)
    said = [sides.ask("logits", prompt=prompt) for prompt in prompts]
    least = min(statistics.correlation(each[OURS], each[THEIRS]) for each in said)
    sides.correlation = round(least, 5)
    if least < LEAST_CORRELATION:
        raise WorkerError(
            f"the sides' logits correlate by {least:.3f}, below {LEAST_CORRELATION}: not the same model"
        )


def _process(sides: Sides, path: str) -> Iterator[dict[str, Any]]:
    """Seconds and peak memory of whole processes, which generate and end."""
    options = sides.options
    commands = {OURS: _our_command(options, path)}
    if sides.theirs is not None:
        script = [*sides.theirs.command, path, PROMPT, str(ANSWER), str(options.threads)]
        commands[THEIRS] = script
    runs: list[dict[str, Any]] = []

    def once() -> Measured:
        runs.append({name: run_process(command) for name, command in commands.items()})
        return {name: run["seconds"] for name, run in runs[-1].items()}

    took = _rounds(options, once)
    said = {name: json.loads(run["out"].splitlines()[-1]) for name, run in runs[-1].items()}
    made = {name: each.get("usage", each)["completion_tokens"] for name, each in said.items()}
    timings = said[OURS]["timings"]
    yield _row("process", "s", took, lambda s: s, tokens=ANSWER, generated=made, timings=timings)
    peaks = [{name: run["peak_bytes"] for name, run in each.items()} for each in runs[1:] or runs]
    yield _row("process", "MB", peaks, lambda nbytes: nbytes / 1e6, tokens=ANSWER)


def _our_command(options: argparse.Namespace, path: str) -> list[str]:
    command = [sys.executable, "-m", "realm_jax", "generate", PROMPT, "-m", path, "-n", str(ANSWER)]
    command += ["--temperature", "0", "--json", "--threads", str(options.threads), "--device", "cpu"]
    for name, value in options.engine_config:
        flag = f"--{name.replace('_', '-')}"
        command += [flag] if value is True else [flag, str(value)] if value is not False else []
    return command


def profile_rows(sides: Sides, path: str) -> Iterator[dict[str, Any]]:
    """Where the time of ours goes: prefill calls, and decode steps for each depth and number of sequences."""
    options, ours = sides.options, sides.ours
    sides.load(path)
    for tokens in options.prefill:
        sides.open("prefill", 1, tokens + 1)
        prompts = ours.ask("draw", count=1, length=tokens)
        yield {"call": "prefill", "tokens": tokens, **ours.ask("profile", prompts=prompts, steps=0)}
    for depth in options.depth:
        for batch in options.batch:
            tokens = depth + max(options.n + 1, 4 * PROFILED_STEPS)
            sides.open(f"decode {batch} after {depth}", batch, tokens)
            prompts, common = _contexts(sides, batch, depth)
            ours.ask("fill", prompts=prompts, common=common)
            found = ours.ask("profile", prompts=prompts, steps=PROFILED_STEPS)
            yield {"call": "decode", "sequences": batch, "depth": depth, **found}


def _rounds(options: argparse.Namespace, once: Callable[[], Measured]) -> list[Measured]:
    """Rounds that count, after one that does not, which also compiles; fewer where a row takes too long."""
    once()
    start, took = time.perf_counter(), [once()]
    while len(took) < options.rounds and time.perf_counter() - start < options.row_seconds:
        took.append(once())
    return took


def _row(
    test: str, unit: str, took: list[Measured], rate: Callable[[float], float], **facts: Any
) -> dict[str, Any]:
    """The medians, and that of the ratios round by round: theirs to ours, of what was taken."""
    row = {"test": test, **facts, "unit": unit, "rounds": len(took)}
    for name in took[0]:
        row[name] = _rounded(statistics.median(rate(each[name]) for each in took))
    if THEIRS in took[0]:
        row["ratio"] = round(statistics.median(each[THEIRS] / each[OURS] for each in took), 3)
    return row


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
