"""`realm bench`: how many tokens a second, and how long one waits."""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realm_jax.cli import options, plots
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.benchmark import Benchmark, Latency, Load, Row, Test

COLUMNS = {  # name -> least width; llama-bench's, with depth and batch as columns of their own
    "model": 26,
    "size": 10,
    "params": 10,
    "backend": 7,
    "threads": 7,
    "type_k": 8,
    "type_v": 8,
    "depth": 5,
    "batch": 5,
    "test": 8,
    "t/s": 18,
}
LEFT = ("model", "backend")


def bench(
    *,
    n_prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", help="Prompt tokens; 0 = no such test.", metavar="N[,N]")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("-n", "--n-gen", help="Generated tokens; 0 = no such test.", metavar="N[,N]")
    ] = "128",
    n_depth: Annotated[
        str, typer.Option("-d", "--n-depth", help="Tokens in the context before.", metavar="N[,N]")
    ] = "0",
    batch: Annotated[str, typer.Option("-b", "--batch", help="Sequences at once.", metavar="N[,N]")] = "1",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", help="Times that a test is run.", metavar="N", min=1)
    ] = 5,
    rate: Annotated[
        str | None,
        typer.Option("--rate", help="Also: latency, with so many requests a second.", metavar="X[,X]"),
    ] = None,
    requests: Annotated[
        int, typer.Option("--requests", help="With --rate: how many arrive.", metavar="N", min=1)
    ] = 64,
    slo_first: Annotated[
        float,
        typer.Option(
            "--slo-first", help="For goodput: a first token within so many seconds.", metavar="X", min=0
        ),
    ] = 1.0,
    slo_each: Annotated[
        float,
        typer.Option(
            "--slo-each", help="For goodput: seconds a token after it, on average.", metavar="X", min=0
        ),
    ] = 0.1,
    seed: Annotated[
        int, typer.Option("-s", "--seed", help="Of prompts and arrivals.", metavar="N", min=0)
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw throughput against batch size.", metavar="OUT.png"),
    ] = None,
    engine: options.EngineFlags,
) -> None:
    """Measure prompt processing (pp), text generation (tg) and latency, with random prompts.

    t/s is the total over the batch, as mean and standard deviation. --ctx-size is what the tests need
    unless given; the largest -b is how many sequences run at once, under --rate too.

    Example: realm bench -p 512 -n 64 -b 1,16,32 --rate 2 --plot out.png
    """
    prompts, tokens = _whole("-p", n_prompt, 0), _whole("-n", n_gen, 0)
    depths, batches = _whole("-d", n_depth, 0), _whole("-b", batch, 1)
    rates = _rates(rate)
    if rates and (len(prompts) > 1 or len(tokens) > 1 or 0 in (*prompts, *tokens)):
        raise RequestError(f"--rate needs one -p and one -n above 0, not -p {n_prompt} -n {n_gen}")
    if plot is not None:
        plots.check_plot(plot)

    from realm_jax.benchmark import Benchmark, Load, PromptProcessing, TextGeneration, setup
    from realm_jax.cli.session import Status, open_model

    tests = [
        kind(count, depth, many)
        for depth, (kind, counts) in itertools.product(
            depths, ((PromptProcessing, prompts), (TextGeneration, tokens))
        )
        for count, many in itertools.product(counts, batches)
        if count
    ]
    loads = [Load(each, requests, max(prompts), max(tokens), slo_first, slo_each) for each in rates]
    if not tests:
        raise RequestError("-p and -n are 0: nothing to measure")
    engine = dataclasses.replace(engine, ctx_size=_context(engine, tests, loads))
    status = Status()
    llm = open_model(engine, status, max_num_seqs=max(batches))
    benchmark, facts = Benchmark(llm, seed=seed), setup(llm)
    status.answering()
    rows = _throughput(benchmark, tests, repetitions, None if as_json else facts)
    latencies = _latency(benchmark, loads, None if as_json else max(batches))
    if as_json:
        found = [row.json() for row in rows] + [each.json(max(batches)) for each in latencies]
        print(json.dumps([facts | each for each in found]))
    if plot is not None:
        _draw(rows, facts["model"], plot)


def _whole(flag: str, text: str, least: int) -> tuple[int, ...]:
    """The numbers of a list such as 128,512."""
    parts = [part.strip() for part in text.split(",")]
    if all(p.isascii() and p.isdecimal() and len(p) < 10 and int(p) >= least for p in parts):
        return tuple(map(int, parts))
    raise RequestError(f"{flag} is {text!r}; give whole numbers from {least} on, such as 16 or 1,16")


def _rates(text: str | None) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if rates and all(math.isfinite(rate) and rate > 0 for rate in rates):
        return rates
    raise RequestError(f"--rate is {text!r}; give requests a second, such as 2 or 0.5,1,2")


def _context(engine: options.EngineFlags, tests: Sequence["Test"], loads: Sequence["Load"]) -> int:
    """The --ctx-size given, or what the tests need. Raises RequestError where it, or the model's, is less."""
    from realm_jax import gguf, hub
    from realm_jax.architectures import read_config
    from realm_jax.benchmark import head_start, required_context

    required = required_context([*tests, *loads])
    with gguf.open(hub.resolve(engine.model, offline=engine.offline)) as file:
        trained = read_config(file).context_length
    given = engine.ctx_size
    if required > (limit := trained if given is None else min(given, trained)):
        remedy = "lower them" if limit == trained else "lower them or raise --ctx-size"
        raise RequestError(
            f"the largest -p, -n and -d are {required:,} tokens together; the "
            f"{'model was trained for' if limit == trained else 'context is'} {limit:,} ({remedy})"
        )
    return min(required + head_start(tests), trained) if given is None else given


def _throughput(
    benchmark: "Benchmark", tests: Sequence["Test"], repetitions: int, facts: dict[str, Any] | None
) -> list["Row"]:
    """The rows; printed as they come, if there are facts to print with them."""
    rows = []
    if facts is not None:
        print(_line({name: name for name in COLUMNS}))
        print(_rule(COLUMNS.items()), flush=True)
    for test in tests:
        _say(f"measuring {test.name}, depth {test.depth}, batch {test.batch}")
        rows.append(benchmark.measure(test, repetitions))
        if facts is not None:
            print(_line(_cells(facts, rows[-1])), flush=True)
        if (drafts := rows[-1].drafts) is not None and drafts.drafted:
            found = f"{drafts.accepted} of {drafts.drafted} guesses accepted"
            _say(f"{found}, {drafts.mean_accepted_length:.2f} tokens a step with guesses")
    return rows


def _latency(benchmark: "Benchmark", loads: Sequence["Load"], batch: int | None) -> list["Latency"]:
    """How the loads were served; printed as they come, if there is a batch to name."""
    found = []
    for load in loads:
        _say(f"measuring latency: {load.requests} requests, {load.rate:g} a second")
        found.append(benchmark.measure_latency(load))
        if batch is not None:
            print("\n" + "\n".join(_latency_lines(found[-1], batch)), flush=True)
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _cells(facts: dict[str, Any], row: "Row") -> dict[str, str]:
    """A row's texts, with llama-bench's units."""
    size, params = facts["size"], facts["params"]
    cells = {name: str(value) for name, value in facts.items()}
    cells["size"] = f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
    cells["params"] = f"{params / 1e9:.2f} B" if params >= 1e9 else f"{params / 1e6:.2f} M"
    cells |= {"depth": str(row.depth), "batch": str(row.batch), "test": row.test}
    return cells | {"t/s": f"{row.tokens_per_second:.2f} ± {row.stddev:.2f}"}


def _line(cells: dict[str, str]) -> str:
    texts = (
        cells[name].ljust(width) if name in LEFT else cells[name].rjust(width)
        for name, width in COLUMNS.items()
    )
    return f"| {' | '.join(texts)} |"


def _rule(columns: Sequence[tuple[str, int]] | Any) -> str:
    dashes = ("-" * width if name in LEFT else "-" * (width - 1) + ":" for name, width in columns)
    return f"| {' | '.join(dashes)} |"


def _latency_lines(found: "Latency", batch: int) -> Iterator[str]:
    """A table of percentiles, and a sentence with the rest."""
    load = found.load
    yield f"| {'milliseconds':24} | {'p50':>9} | {'p90':>9} | {'p99':>9} |"
    yield f"| {'-' * 24} | {'-' * 8}: | {'-' * 8}: | {'-' * 8}: |"
    named = {
        "time to first token": found.first_token,
        "time between tokens": found.between_tokens,
        "end to end": found.end_to_end,
    }
    for name, of in named.items():
        if of is not None:
            yield f"| {name:24} | {of.p50 * 1e3:9.1f} | {of.p90 * 1e3:9.1f} | {of.p99 * 1e3:9.1f} |"
    yield ""
    yield (
        f"{load.requests} requests of {load.prompt} + {load.tokens} tokens, up to {batch} at once, "
        f"{load.rate:g} a second arriving: {found.requests_per_second:.2f} a second served, "
        f"{found.tokens_per_second:.2f} generated tokens a second; goodput {found.goodput:.2f} requests a "
        f"second (first token within {load.first_within:g} s, then {load.each_within:g} s a token on average)"
    )


def _draw(rows: Sequence["Row"], title: str, path: Path) -> None:
    """A line for each test over batch sizes, with its deviation."""
    labels = {"xlabel": "sequences at once", "ylabel": "tokens a second, in total"}
    with plots.axes(path, title=title, **labels) as axes:
        for (test, depth), group in itertools.groupby(rows, lambda row: (row.test, row.depth)):
            mine = sorted(group, key=lambda row: row.batch)
            axes.errorbar(
                [row.batch for row in mine],
                [row.tokens_per_second for row in mine],
                [row.stddev for row in mine],
                marker="o",
                capsize=3,
                label=f"{test} @ d{depth}" if depth else test,
            )
        batches = sorted({row.batch for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        axes.set_ylim(bottom=0)
