"""`realm batch`: a file of requests, answered many at once."""

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.processes import ProcessFlags, join
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.serving.batch import Progress


def batch(
    *,
    source: Annotated[Path, typer.Argument(help="The requests, one JSON object a line.", metavar="IN.jsonl")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Where the responses go.", metavar="OUT.jsonl")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted job.")] = False,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="With --resume: try failed lines again.")
    ] = False,
    ordered: Annotated[
        bool, typer.Option("--ordered", help="Sort the output as the input in the end.")
    ] = False,
    shard: Annotated[
        str, typer.Option("--shard", help="Do part I of N: 2/4 is the second quarter.", metavar="I/N")
    ] = "1/1",
    seed: Annotated[int, typer.Option("-s", "--seed", help="Of lines that name none.", metavar="N")] = 0,
    max_num_seqs: options.MaxNumSeqs = 32,
    max_loras: options.MaxLoras = 8,
    max_lora_rank: options.MaxLoraRank = None,
    engine: options.EngineFlags,
    processes: ProcessFlags,
) -> None:
    """Answer a file of requests: OpenAI batch lines, or {"id", "prompt" | "messages", ...sampling}.

    A line's "lora" names an adapter of --lora NAME=PATH, or is a list of [name, scale]; so may "model".
    Results are written as they finish, one line each; a bad line becomes an error line. After an
    interruption, --resume does what is left and gives the same set of lines.

    Example: realm batch questions.jsonl -o answers.jsonl --ctx-size 2048
    """
    part = _shard(shard)
    if retry_errors and not resume:
        raise RequestError("--retry-errors needs --resume")
    if not source.is_file():
        raise RequestError(f"{source}: no such file")

    from realm_jax.cli.session import Status, open_model
    from realm_jax.serving.batch import BatchJob

    if resume and processes != ProcessFlags():
        raise RequestError("--resume is for one process (several: choose another output)")
    if not join(processes, engine):
        output = Path(tempfile.mkdtemp(prefix="realm-batch-")) / output.name  # the first process writes it
    status = Status()
    llm = open_model(
        engine,
        status,
        names_adapters=True,
        max_num_seqs=max_num_seqs,
        max_loras=max_loras,
        max_lora_rank=max_lora_rank,
    )
    job = BatchJob(llm, source, output, seed=seed, shard=part)
    report = _Report()
    status.answering()
    try:
        final = job.run(resume=resume, retry_errors=retry_errors, on_progress=report.show)
    except OSError as error:
        raise RequestError(f"{error.filename or output}: {error.strerror}") from error
    if ordered:
        job.order_output()
    report.finish(final)


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count) <= 1 << 20:
        return int(index), int(count)
    raise RequestError(f"--shard is {text!r}; give part and parts, such as 1/4")


class _Report:
    """Progress on stderr: a line that changes on a terminal, a line every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._start = self._shown = time.perf_counter()
        self._before: int | None = None

    def show(self, progress: "Progress") -> None:
        """How far the job is, if it is time to say so."""
        now = time.perf_counter()
        if self._before is None:
            self._before = progress.done - 1
        if now - self._shown < (0.2 if sys.stderr.isatty() else 10.0):
            return
        self._shown = now
        elapsed = now - self._start
        left = (progress.total - progress.done) * elapsed / (progress.done - self._before)
        end = "\r" if sys.stderr.isatty() else "\n"
        print(f"{self._line(progress, elapsed)}, {left:,.0f} s left   ", end=end, file=sys.stderr, flush=True)

    def finish(self, progress: "Progress") -> None:
        """The last word."""
        print(self._line(progress, time.perf_counter() - self._start), file=sys.stderr)

    def _line(self, progress: "Progress", elapsed: float) -> str:
        return (
            f"{progress.done:,} of {progress.total:,}, {progress.errors:,} errors, "
            f"{progress.tokens / max(elapsed, 1e-9):,.0f} tokens/s"
        )
