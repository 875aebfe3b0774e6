"""Benchmarks count what was generated and time nothing else. Times themselves are never tested."""

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import realm
from conftest import count_compilations

from realm_jax import LLM, RequestError
from realm_jax.benchmark import (
    Benchmark,
    Latency,
    Load,
    Percentiles,
    PromptProcessing,
    RandomPrompts,
    Row,
    Sample,
    TextGeneration,
    time_generation,
    time_load,
)
from realm_jax.serving.request import Request, TextDelta

pytestmark = pytest.mark.unoptimized

CONTRACT = ["test", "depth", "batch", "tokens_per_second", "stddev"]
COLUMNS = ["model", "size", "params", "backend", "threads", "type_k", "type_v"]
COLUMNS += ["depth", "batch", "test", "t/s"]
LOAD = Load(rate=400, requests=9, prompt=20, tokens=5, first_within=60, each_within=60)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, ctx_size=256, max_num_seqs=4)


@pytest.fixture
def token_clock(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that a prompt's token moves by a thousand seconds, and a generated token by one."""
    seconds, add, step = 0.0, llm.engine.add_request, llm.engine.step

    def add_request(request: Request) -> None:
        nonlocal seconds
        seconds += 1000 * len(request.prompt_ids)
        add(request)

    def read_step() -> list[TextDelta]:
        nonlocal seconds
        deltas = step()
        assert not any(delta.output.usage.cached_tokens for delta in deltas if delta.output is not None)
        seconds += sum(len(delta.token_ids) for delta in deltas)
        return deltas

    monkeypatch.setattr(llm.engine, "add_request", add_request)
    monkeypatch.setattr(llm.engine, "step", read_step)
    return lambda: seconds


@pytest.mark.parametrize("depth", [0, 30, 150])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_clock_of_tokens_gives_the_rate_that_it_has(
    llm: LLM, token_clock: Callable[[], float], depth: int, batch: int
):
    benchmark, start = Benchmark(llm, clock=token_clock), token_clock()
    row = benchmark.measure(TextGeneration(7, depth, batch), 3)
    assert row.tokens_per_second == 1 and row.stddev == 0  # prompts took a thousand times longer
    assert len(row.samples) == 3 and all(7 * batch <= s.tokens < 10 * batch for s in row.samples)
    generated = token_clock() - start - 4 * 1000 * (batch * max(depth, 1) + 1)  # one to settle
    assert generated < 4 * batch * 20  # what ran on after its sample was stopped
    row = benchmark.measure(PromptProcessing(25, depth, batch), 2)
    first_tokens = 0 if depth else batch  # after a depth, those of the shorter prompts are subtracted
    took = batch * 25 * 1000 + first_tokens  # nothing reused
    assert row.samples == (Sample(batch * 25, took),) * 2
    assert row.tokens_per_second == pytest.approx(batch * 25 / took)
    assert not llm.engine.has_work and llm.engine.step() == []


def test_nothing_compiles_while_the_clock_runs(tiny_model: Path):
    llm = LLM(tiny_model, ctx_size=256, max_num_seqs=4)  # one that has run nothing
    benchmark = Benchmark(llm)
    programs = dict(llm.engine.programs)
    with count_compilations() as compiled:
        for batch in (1, 4):
            benchmark.measure(TextGeneration(4, 150, batch), 1)
            benchmark.measure(PromptProcessing(130, 0, batch), 1)
        benchmark.measure_latency(LOAD)
    assert not compiled and llm.engine.programs == programs


def test_sequences_that_do_not_run_together_are_refused(tiny_model: Path):
    llm = LLM(tiny_model, ctx_size=256, max_num_seqs=2)
    prompts = RandomPrompts(llm, 0)
    with pytest.raises(RequestError, match="3 sequences do not get 10 tokens together"):
        time_generation(llm.engine, prompts.draw(3, 1), 10)
    with pytest.raises(RequestError, match="2 sequences do not get 253 tokens together"):
        time_generation(llm.engine, prompts.draw(2, 30), 253)
    assert not llm.engine.has_work
    assert time_generation(llm.engine, prompts.draw(2, 1), 10).tokens >= 20


def test_a_row_has_the_mean_time_and_its_deviation():
    row = Row.of(PromptProcessing(10, 0, 2), [Sample(20, 1.0), Sample(20, 2.0), Sample(20, 3.0)])
    assert (row.test, row.depth, row.batch) == ("pp10", 0, 2)
    assert row.tokens_per_second == pytest.approx(10)
    assert row.stddev == pytest.approx(5)  # one second of two, half of the rate
    assert Row.of(TextGeneration(4, 0, 1), [Sample(4, 2.0)]).stddev == 0
    with pytest.raises(RequestError, match="raise -p or -r"):
        Row.of(PromptProcessing(1, 9, 1), [Sample(1, 0.5), Sample(1, -0.6)])


def test_prompts_are_ordinary_tokens_and_begin_differently(llm: LLM):
    prompts = RandomPrompts(llm, 0)
    some = [*prompts.draw(50, 6), *prompts.draw(40, 1), *prompts.draw(30, 9)]
    assert [len(p) for p in some] == [6] * 50 + [1] * 40 + [9] * 30
    assert len({p[0] for p in some}) == len(some)
    assert not any(llm.tokenizer.is_special(i) or i in llm.tokenizer.eog_ids for p in some for i in p)
    assert RandomPrompts(llm, 0).draw(50, 6) == some[:50] != RandomPrompts(llm, 1).draw(50, 6)


def test_percentiles_of_hand_made_lists():
    assert Percentiles.of(range(101)) == Percentiles(50, 90, 99)
    assert Percentiles.of([7]) == Percentiles(7, 7, 7)
    few = Percentiles.of([3, 1, 2])
    assert (few.p50, few.p90, few.p99) == pytest.approx((2, 2.8, 2.98))


def test_latency_counts_from_the_arrival():
    load = Load(rate=1, requests=3, prompt=1, tokens=3, first_within=1.5, each_within=0.4)
    times = [[0.5, 0.7, 0.9], [3.0, 3.1, 3.2], [3.5, 4.0, 4.5]]  # well; waited two seconds; slow
    latency = Latency.of(load, [0.0, 1.0, 3.0], times)
    assert latency.first_token == Percentiles.of([0.5, 2.0, 0.5])
    assert latency.between_tokens is not None
    assert latency.between_tokens.p50 == pytest.approx(0.2) and latency.between_tokens.p99 <= 0.5
    assert latency.end_to_end == Percentiles.of([0.9, 2.2, 1.5])
    assert (latency.tokens, latency.seconds) == (9, 4.5)
    assert latency.goodput == pytest.approx(1 / 4.5)
    assert latency.tokens_per_second == pytest.approx(2)
    assert latency.requests_per_second == pytest.approx(3 / 4.5)


def test_arrivals_are_a_poisson_process():
    load = Load(rate=5, requests=20_000, prompt=1, tokens=1, first_within=1, each_within=1)
    arrivals = load.arrivals(0)
    assert len(arrivals) == 20_000 and arrivals[0] == 0 and arrivals == load.arrivals(0) != load.arrivals(1)
    gaps = np.diff(arrivals)
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(0.2, rel=0.03) and gaps.std() == pytest.approx(0.2, rel=0.03)


def test_a_load_is_served_as_it_comes(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    added: list[tuple[str, float]] = []
    add, now = llm.engine.add_request, 0.0

    def clock() -> float:
        nonlocal now
        now += 1e-4
        return now

    monkeypatch.setattr(
        llm.engine, "add_request", lambda request: (added.append((request.id, now)), add(request))
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    latency = time_load(llm.engine, LOAD, RandomPrompts(llm, 0).draw(9, 20), seed=3, clock=clock)
    assert latency.tokens == 9 * 5
    assert len({name for name, _ in added}) == 9
    late = [moment - due for (_, moment), due in zip(added, LOAD.arrivals(3), strict=True)]
    assert min(late) > 0
    for of in (latency.first_token, latency.end_to_end):
        assert 0 < of.p50 <= of.p90 <= of.p99 <= latency.seconds
    assert latency.first_token.p50 < latency.end_to_end.p50
    assert latency.goodput == latency.requests_per_second


def bench(model: Path, *arguments: object) -> Iterator[dict]:
    done = realm("bench", "-m", model, "-r", 2, "-c", 256, *arguments)  # the shapes of the other tests
    assert done.code == 0, done.err
    return iter(json.loads(done.out))


def test_json_has_a_row_for_each_test_asked_for(tiny_model: Path):
    rows = list(bench(tiny_model, "-p", "40,130", "-n", 4, "-b", "1,3", "--json"))
    found = [(row["test"], row["depth"], row["batch"]) for row in rows]
    assert found == [(test, 0, b) for test in ("pp40", "pp130", "tg4") for b in (1, 3)]
    deep = list(bench(tiny_model, "-p", 0, "-n", "4,7", "-d", "0,90", "--json"))
    found = [(row["test"], row["depth"], row["batch"]) for row in deep]
    assert found == [(test, depth, 1) for depth in (0, 90) for test in ("tg4", "tg7")]
    for row in rows + deep:
        assert set(CONTRACT) < row.keys() and row["tokens_per_second"] > 0 and row["stddev"] >= 0
        assert row["model"] == "llama F32" and row["backend"] == "cpu" and row["params"] > 0
        seconds = [sample["seconds"] / sample["tokens"] for sample in row["samples"]]
        assert row["tokens_per_second"] == pytest.approx(2 / sum(seconds))


def test_latency_is_a_row_too(tiny_model: Path):
    arguments = ("-p", 0, "-n", 4, "-b", 2, "--json")
    assert [row["test"] for row in bench(tiny_model, *arguments)] == ["tg4"]
    arguments = ("-p", 8, "-n", 4, "-b", 2, "--rate", "90,900", "--requests", 5, "--json")
    *_, slow, fast = bench(tiny_model, *arguments)
    for row, rate in ((slow, 90), (fast, 900)):
        assert set(CONTRACT) < row.keys() and (row["test"], row["batch"]) == ("latency", 2)
        assert row["load"]["rate"] == rate and row["tokens"] == 20
        assert row["first_token"].keys() == {"p50", "p90", "p99"}


def test_markdown_has_llama_benchs_columns_and_the_plot_is_a_png(tiny_model: Path, tmp_path: Path):
    plot = tmp_path / "out.png"
    done = realm(
        *("bench", "-m", tiny_model, "-p", 190, "-n", 4, "-b", "1,2", "-r", 1),
        *("--rate", 900, "--requests", 4, "--plot", plot),
    )
    assert done.code == 0, done.err
    throughput, latency, sentence = done.out.rstrip().split("\n\n")
    header, rule, *rows = [
        [c.strip() for c in line.strip("|").split("|")] for line in throughput.splitlines()
    ]
    assert header == COLUMNS
    assert all(set(cell) <= set("-:") for cell in rule)
    assert [row[-2] for row in rows] == ["pp190", "pp190", "tg4", "tg4"]
    assert all(len(row) == len(header) and " ± " in row[-1] for row in rows)
    assert len({len(line) for line in throughput.splitlines()}) == 1
    assert [line.split("|")[1].strip() for line in latency.splitlines()[2:]] == [
        "time to first token",
        "time between tokens",
        "end to end",
    ]
    assert "goodput" in sentence
    data = plot.read_bytes()
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and width > 500 and height > 300
    assert data.endswith(b"IEND\xaeB`\x82")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-p 2000 -n 40 -d 9", "are 2,049 tokens together; the model was trained for 2,048"),
        ("-p 64 -n 8 -c 71", "are 72 tokens together; the context is 71 (lower them or raise --ctx-size)"),
        ("-p 0 -n 0", "nothing to measure"),
        ("-p many", "-p is 'many'"),
        ("-b 1,0", "-b is '1,0'; give whole numbers from 1 on"),
        ("-d -1", "-d is '-1'"),
        ("--rate 0", "--rate is '0'"),
        ("--rate inf", "--rate is 'inf'"),
        ("-p 8,16 --rate 1", "--rate needs one -p"),
        ("--plot out.xyz", "must end with .png"),
        ("--plot no/such/folder/out.png", "folder does not exist"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(tiny_model: Path, arguments: str, words: str):
    done = realm("bench", "-m", tiny_model, *arguments.split())
    assert words in done.error and done.code == 2
    assert "loading" not in done.err


def test_a_plot_without_matplotlib_is_refused_at_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = realm("bench", "-m", tiny_model, "--plot", "out.png")
    assert done.error == "--plot needs matplotlib: pip install 'realm-jax[plot]'" and done.code == 1
    assert "loading" not in done.err


def test_the_comparison_says_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit, match="pip install llama-cpp-python"):
        runpy.run_path(str(Path(__file__).with_name("bench_peer.py")), run_name="__main__")
