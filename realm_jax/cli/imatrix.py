"""`realm imatrix`: which inputs of each projection are large, so that quantizing spares them."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.outputs import files_of, require_writable
from realm_jax.cli.text import read_text
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.tokenizer import Tokenizer

WINDOW = 512


def imatrix(
    *,
    file: Annotated[
        Path, typer.Option("-f", "--file", help="A text like those the model is for; - reads stdin.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write.", metavar="OUT.gguf")
    ] = Path("imatrix.gguf"),
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", min=1, help="Windows to use at most.  [default: all]", metavar="N"),
    ] = None,
    engine: options.EngineFlags,
) -> None:
    """Write an importance matrix: the mean square of each input of each projection over a text.

    The text is cut into windows of --ctx-size tokens [default: 512]. The file is llama.cpp's, and is for
    realm quantize --imatrix or for llama-quantize.

    Example: realm imatrix -m model-bf16.gguf -f calibration.txt -o imatrix.gguf
    """
    require_writable(output, [file])
    text = read_text(file)

    from realm_jax import gguf
    from realm_jax.cli.session import Status, open_model
    from realm_jax.gguf.writer import path_text
    from realm_jax.quantization import importance
    from realm_jax.quantization.observed import observe

    window = engine.ctx_size or WINDOW
    llm = open_model(dataclasses.replace(engine, ctx_size=window), Status(), max_num_seqs=1)
    with gguf.open(llm.model.path) as read:
        require_writable(output, files_of(read))
    if llm.engine_config.tensor_parallel > 1:
        raise RequestError(f"--mesh {engine.mesh}: an importance matrix is made on one device")
    windows = _windows(llm.tokenizer, text, window)[:chunks]

    def show(done: int) -> None:
        print(f"window {done} of {len(windows)}", file=sys.stderr)

    squares = observe(llm.transformer, llm.model.params, llm.model.numerics, windows, show)
    for name, each in squares.items():
        if each.unseen:
            print(
                f"note: {name}: {each.unseen} of {len(each.counts)} experts were never chosen",
                file=sys.stderr,
            )
    importance.write(output, squares, chunks=len(windows), chunk_size=window, dataset=path_text(file))
    print(output)


def _windows(tokenizer: "Tokenizer", text: str, size: int) -> list[list[int]]:
    """The text's tokens, cut; where the model wants a BOS, each window begins with one."""
    ids = tokenizer.encode(text, add_special=True)
    windows = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    if not windows:
        raise RequestError(f"text is {len(ids):,} tokens; one window is {size:,} (give more, or lower -c)")
    if not tokenizer.add_bos or tokenizer.bos_id is None:
        return windows
    return [[tokenizer.bos_id, *each[1:]] for each in windows]
