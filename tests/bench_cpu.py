"""realm_jax and llama.cpp on the CPU: the same files and token ids, speed and memory, as JSON.

Each side has a process of its own; they measure in turn, and one waits while the other works. Medians over
rounds; a ratio above 1 says that realm_jax is that many times as fast, or needs that much less.

  prefill   prompt tokens a second, to the first generated token, one sequence
  decode    generated tokens a second, total over the sequences, after so many tokens of context
  ttft      milliseconds to the first token of a short prompt, the model loaded
  load      MB of file a second, the file in the page cache
  process   seconds and peak memory of a process that generates 32 tokens and ends; what realm_jax compiles
            is in its cache

Example: scripts/bench_cpu --models q4_1,q8_0 --tests prefill,decode --batch 1,16 --markdown
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_report import check_plot, draw, markdown, profile_table, row_line
from bench_rows import TESTS, Sides, measure, profile_rows
from bench_workers import Worker, WorkerError

MODELS = ("q4_1", "q4_0", "q8_0", "q4_k_m", "q6_k", "bf16", "1b_q4_0", "1b_q8_0")
HERE = Path(__file__).parent


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def setting(text: str) -> tuple[str, Any]:
    """key=value; the value as JSON where it is that, else as text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--models",
        type=words,
        default=MODELS,
        metavar="NAME,...",
        help=f"of {','.join(MODELS)},8b_q4_0; or paths",
    )
    add("--tests", type=words, default=TESTS, metavar="NAME,...", help=f"of {','.join(TESTS)}")
    add("--prefill", type=numbers, default=(128, 512, 2048), metavar="N,...", help="prompt tokens")
    add("--batch", type=numbers, default=(1, 2, 4, 8, 16, 32), metavar="N,...", help="sequences at once")
    add("--depth", type=numbers, default=(128, 1024), metavar="N,...", help="tokens of context before")
    add("-n", type=int, default=64, metavar="N", help="tokens that each sequence generates")
    add("--rounds", type=int, default=5, metavar="N")
    add("--row-seconds", type=float, default=30, metavar="X", help="a row that takes longer has fewer rounds")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="of both sides")
    add("--peer-python", metavar="PATH", help="an interpreter with llama_cpp; default: this one")
    add("--kv-unified", action="store_true", help="llama.cpp: one cache for all sequences")
    add("--engine-config", type=setting, action="append", default=[], metavar="K=V", help="ours; repeatable")
    add(
        "--profile",
        action="store_true",
        help="instead: where a decode step's and a prefill's time goes, ours",
    )
    add("--plot", type=Path, metavar="FILE.png", help="decode speed against sequences; needs matplotlib")
    add("--markdown", action="store_true", help="print a table, not JSON")
    return parser


def peer_python(path: str | None) -> str | None:
    """The interpreter that has llama_cpp; None, said on stderr, if none was named and this one has not."""
    python = path or sys.executable
    try:
        found = subprocess.run([python, "-c", "import llama_cpp"], capture_output=True, check=False)
    except OSError as error:
        sys.exit(f"error: --peer-python {python}: {error.strerror}")
    if not found.returncode:
        return python
    if path is not None:
        sys.exit(f"error: {python} cannot import llama_cpp: pip install llama-cpp-python numpy")
    print("note: llama_cpp is not installed: only realm_jax is measured, no ratios", file=sys.stderr)
    return None


def prepared(sides: Sides, name: str) -> dict[str, Any]:
    """The model's file, made if it is missing."""
    said = sides.ours.ask("prepare", name=name)
    if (wanted := said.get("quantize")) is not None:
        if sides.theirs is None:
            raise WorkerError(f"{wanted['target']} is missing; llama_cpp makes it (see --peer-python)")
        print(f"making {wanted['target']}", file=sys.stderr)
        sides.theirs.ask("quantize", **wanted)
        said = sides.ours.ask("prepare", name=name)
    return said


def run_models(options: argparse.Namespace, python: str | None) -> dict[str, Any]:
    """All models' rows; a model that fails is named with its reason, and the others are measured."""
    rows: list[dict[str, Any]] = []
    facts: dict[str, Any] = {"models": {}, "flags": {}, "versions": {}, "logit_correlation": {}, "failed": {}}
    for name in options.models:
        ours = Worker("realm_jax", [sys.executable, str(HERE / "bench_ours.py")])
        theirs = python and Worker("llama_cpp", [python, str(HERE / "bench_theirs.py")])
        sides = Sides(ours, theirs or None, options)
        try:
            facts["models"][name] = file = prepared(sides, name)
            facts["versions"] = sides.ask("facts")
            measured = profile_rows if options.profile else measure
            for row in measured(sides, file["path"]):
                rows.append({"model": name, **row})
                print(row_line(rows[-1]), file=sys.stderr)
        except WorkerError as error:
            facts["failed"][name] = str(error)
            print(f"error: {name}: {error}", file=sys.stderr)
        finally:
            facts["flags"][name] = sides.flags
            if sides.correlation is not None:
                facts["logit_correlation"][name] = sides.correlation
            sides.close()
    return {**facts, "rows": rows}


def machine() -> dict[str, Any]:
    """What this runs on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    options = parser().parse_args()
    if unknown := sorted(set(options.tests) - set(TESTS)):
        sys.exit(f"error: unknown test {', '.join(unknown)}; known: {', '.join(TESTS)}")
    if options.plot is not None:
        check_plot(options.plot)
    facts, start = machine(), time.perf_counter()
    if facts["load_average_before"] > 0.5:
        print(f"warning: the load average is {facts['load_average_before']}", file=sys.stderr)
    found = run_models(options, None if options.profile else peer_python(options.peer_python))
    facts |= {"threads": options.threads, "rounds": options.rounds, **found}
    facts["seconds"] = round(time.perf_counter() - start, 1)
    if options.profile:
        print(profile_table(found["rows"]), file=sys.stderr)
    if options.markdown and not options.profile:
        print(markdown(found["rows"]))
    else:
        print(json.dumps(facts))
    if options.plot is not None and not options.profile:
        draw(found["rows"], options.plot)
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
