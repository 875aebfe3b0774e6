"""`realm perplexity`: how well a model predicts a text."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.processes import ProcessFlags, join
from realm_jax.cli.text import read_text

WINDOW = 512


def perplexity(
    *,
    file: Annotated[Path, typer.Argument(help="A text file; - reads stdin.", metavar="FILE")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    engine: options.EngineFlags,
    processes: ProcessFlags,
) -> None:
    """Print the perplexity of a text, as llama-perplexity defines it.

    The text is cut into windows of --ctx-size tokens [default: 512]; the second half of each is scored.

    Example: realm perplexity book.txt -c 512 --json
    """
    text = read_text(file)

    from realm_jax.cli.session import Status, open_model
    from realm_jax.perplexity import perplexities

    join(processes, engine)
    status = Status()
    window = engine.ctx_size or WINDOW
    llm = open_model(dataclasses.replace(engine, ctx_size=window), status, max_num_seqs=4)
    tokenizer = llm.tokenizer
    ids = tokenizer.encode(text, add_special=True)
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    running = []
    for value in perplexities(llm, ids, window=window, bos=bos):
        running.append(value)
        print(f"window {len(running)} of {len(ids) // window}: {value:.4f}", file=sys.stderr)
    if as_json:
        scored = len(running) * (window - window // 2 - 1)
        print(json.dumps({"perplexity": running[-1], "tokens": scored, "running": running}))
    else:
        print(f"{running[-1]:.4f}")
