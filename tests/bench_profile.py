"""Where the time of a call of ours goes, from the operations that XLA's CPU backend reports to jax.profiler.

An operation's part follows from its `op_name`, the target of a custom call, or the Python functions that it
was traced in. At each moment the operations
that run share the time; where none does, it is `dispatch` inside a program and `host` outside of all.
"""

import functools
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import nlargest
from pathlib import Path
from typing import Any

import jax
from bench_hlo import UNKNOWN, Instruction, Program, read_program
from jax.extend import backend

from realm_jax.benchmark import time_prompts
from realm_jax.benchmark.workload import greedy, settle
from realm_jax.serving.engine import Engine

OTHER, DISPATCH, HOST = "other", "dispatch", "host"
RULES = (  # the first that is found in a label names the part
    (
        "matmul",
        r"realm_\w*(matmul|product)|Linear\.__call__|__rmatmul__|/(qkv|out|gate_up|down|router)/|\.logits/",
    ),
    ("cache update", r"realm_\w*cache|Cache\.write|^jit\(\w+\)/scatter"),
    ("attention", r"realm_\w*(attention|extend)|Cache\.attend|/attention/.*(while|dot_general)"),
    ("sampling", r"realm_\w*(sampl|top_k|argmax)|\bsample\b|/cond/branch|^jit\(\w+\)/(?!Transformer)"),
    ("norm and elementwise", r"realm_|Transformer|Block"),
)
PARTS = (*(part for part, _ in RULES), OTHER, DISPATCH, HOST)
CONTAINERS = ("while", "call", "conditional")  # operations of which the inner ones are reported, too
TOP = 20  # origins of operations that are listed, all layers together; theirs is not wall time
ROTATED = 7  # tokens by which a prompt is rotated, so that none of it is in the cache


def part_of(instruction: Instruction) -> str:
    """The part of a call that the instruction belongs to."""
    return _part(instruction.label)


@functools.cache
def _part(label: str) -> str:
    return next((part for part, rule in RULES if re.search(rule, label)), OTHER)


@dataclass(frozen=True)
class Event:
    """An operation that ran, in nanoseconds."""

    start: float
    end: float
    name: str
    run: tuple[str, int]  # module, run
    instruction: Instruction = UNKNOWN


def attribute(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> dict[str, Any]:
    """Milliseconds of a decode step with these prompts running, by part; with 0 steps, of prefilling them.

    `milliseconds` is measured without the profiler, and its parts are scaled to that.
    """
    if steps:
        plain, events = _decode(engine, prompts, steps)
        calls = _runs(events)
        start, end, count = calls[0], calls[-1], len(calls) - 1
        lead = 0.0
    else:
        plain, traced, events = _prefill(engine, prompts)
        start, end, count = min(e.start for e in events), max(e.end for e in events), 1
        lead = max(traced * 1e9 - (end - start), 0.0)  # the host's part before the first operation
    spent = _shares(events, start, end)
    spent[HOST] += lead
    scale = plain * 1e3 / sum(spent.values())
    named = defaultdict[str, float](float)
    for event in events:
        if event.instruction.opcode not in CONTAINERS and start <= event.start < end:
            named[f"{part_of(event.instruction)}: {event.instruction.origin}"] += event.end - event.start
    return {
        "milliseconds": round(plain * 1e3, 3),
        "traced_milliseconds": round(sum(spent.values()) / count / 1e6, 3),
        "parts": {part: round(spent[part] * scale, 3) for part in PARTS},
        "top": {
            name: round(named[name] / count / 1e6, 3) for name in nlargest(TOP, named, key=named.__getitem__)
        },
    }


def _decode(engine: Engine, prompts: Sequence[Sequence[int]], steps: int) -> tuple[float, list[Event]]:
    """Seconds of a step, and the operations of others."""
    requests = greedy(prompts, max_tokens=None)
    waiting = {request.id for request in requests}

    def run() -> None:
        for _ in range(steps):
            engine.step()

    try:
        for request in requests:
            engine.add_request(request)
        while waiting:
            waiting -= {delta.request_id for delta in engine.step()}
        run()
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) / steps, _traced(run)
    finally:
        for request in requests:
            engine.abort(request.id)
        settle(engine, prompts[0][0])


def _prefill(engine: Engine, prompts: Sequence[Sequence[int]]) -> tuple[float, float, list[Event]]:
    """Seconds without and with the profiler, and the operations."""
    rotated = [[[*p[i * ROTATED :], *p[: i * ROTATED]] for p in prompts] for i in range(1, 4)]
    time_prompts(engine, rotated[0])
    plain, traced = time_prompts(engine, rotated[1]), 0.0

    def run() -> None:
        nonlocal traced
        traced = time_prompts(engine, rotated[2])

    events = _traced(run)
    return plain, traced, events


def _traced(task: Callable[[], None]) -> list[Event]:
    """The operations that the task ran."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls would cost more than they say
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            task()
        finally:
            jax.profiler.stop_trace()
        file = next(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
        return _with_instructions(list(_events(data)))


def _events(data: Any) -> Iterable[tuple[int, Event]]:
    """The operations of a trace, with the number of their program."""
    for plane in data.planes:
        for line in plane.lines if plane.name.startswith("/host:CPU") else ():
            for event in line.events:
                facts = dict(event.stats)
                if (name := facts.get("hlo_op")) is not None:
                    run = (str(facts.get("hlo_module")), int(facts.get("run_id", 0)))
                    end = event.start_ns + event.duration_ns
                    yield int(facts.get("program_id", 0)), Event(event.start_ns, end, str(name), run)


def _with_instructions(events: list[tuple[int, Event]]) -> list[Event]:
    """The events with what their programs say of them.

    Several programs may have one name: a trace's is the one that knows most of its operations.
    """
    known: defaultdict[str, list[Program]] = defaultdict(list)
    for module, program in _live_programs():
        known[module].append(program)
    seen: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for program, event in events:
        seen[event.run[0], program].add(event.name)
    best = {
        key: max(known[key[0]], key=lambda program: len(names & program.keys()), default={})
        for key, names in seen.items()
    }
    return [
        Event(e.start, e.end, e.name, e.run, best[e.run[0], program].get(e.name, UNKNOWN))
        for program, e in events
    ]


def _live_programs() -> Iterable[tuple[str, Program]]:
    """The module's name and the instructions of everything compiled in this process."""
    for executable in backend.get_backend().live_executables():
        for module in executable.hlo_modules():
            yield module.name, read_program(module.to_string())


def _runs(events: Iterable[Event]) -> list[float]:
    """When each run of the program began that took most of the time."""
    taken, began = Counter[str](), dict[tuple[str, int], float]()
    for event in events:
        taken[event.run[0]] += int(event.end - event.start)
        began[event.run] = min(event.start, began.get(event.run, event.start))
    main = taken.most_common(1)[0][0]
    return sorted(start for (module, _), start in began.items() if module == main)


def _shares(events: Iterable[Event], start: float, end: float) -> defaultdict[str, float]:
    """Nanoseconds of each part between two moments: they add up to what lies between."""
    points: list[tuple[float, int, str]] = []
    programs: dict[tuple[str, int], tuple[float, float]] = {}
    for event in events:
        first, last = programs.get(event.run, (event.start, event.end))
        programs[event.run] = min(first, event.start), max(last, event.end)
        if event.instruction.opcode not in CONTAINERS:
            points += [
                (event.start, 1, part_of(event.instruction)),
                (event.end, -1, part_of(event.instruction)),
            ]
    for first, last in programs.values():
        points += [(first, 1, DISPATCH), (last, -1, DISPATCH)]
    spent, running, before = defaultdict[str, float](float), Counter[str](), start
    for moment, change, part in sorted([*points, (end, 0, HOST)]):
        now = min(max(moment, start), end)
        _share(spent, running, now - before)
        before = now
        running[part] += change
    return spent


def _share(spent: defaultdict[str, float], running: Counter[str], time: float) -> None:
    """The time goes to what runs, in equal parts."""
    parts = {part: count for part, count in running.items() if count > 0 and part != DISPATCH}
    parts = parts or ({DISPATCH: 1} if running[DISPATCH] > 0 else {HOST: 1})
    for part, count in parts.items():
        spent[part] += time * count / sum(parts.values())
