"""`realm lora merge`: adapters folded into a model file."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from realm_jax.cli import options, progress
from realm_jax.cli.adapters import opened_base, scaled
from realm_jax.cli.flags import flag
from realm_jax.cli.outputs import files_of, require_writable
from realm_jax.cli.tensor_types import NAMES, tensor_type
from realm_jax.errors import RequestError


def merge(
    *,
    model: options.Model = None,
    lora: Annotated[
        list[str] | None,
        flag(
            "--lora", "An adapter, and what its change is multiplied by; repeatable.", metavar="PATH[:SCALE]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The merged model.", metavar="OUT.gguf")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help=f"The type of matrices, as realm quantize --pure makes it: {NAMES}.  [default: each keeps "
            "its type, but changed ones that were quantized take F16]",
            show_default=False,
            metavar="TYPE",
        ),
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Fold adapters into a model: W + scale * B A. Several add.

    Tensors are read and written one after another, so memory stays small. All metadata is kept.

    Example: realm lora merge -m model.gguf --lora adapter.gguf:0.5 -o merged.gguf
    """
    from realm_jax.lora import read
    from realm_jax.quantization.merging import Merge

    to = tensor_type("--type", kind)
    if not lora:
        raise RequestError("nothing to merge; give at least one --lora PATH[:SCALE]")
    with opened_base(model, offline=offline) as (file, base):
        require_writable(output, [*files_of(file), *(path for path, _ in map(scaled, lora))])
        adapters = [(read(path, base), scale) for path, scale in map(scaled, lora)]
        Merge(file, adapters, to).write(output, progress.of_tensors(len(file.tensors)))
        changed = sum(any(adapter.changes(name) for adapter, _ in adapters) for name in file.tensors)
    print(f"{changed} of {len(base.shapes)} tensors changed", file=sys.stderr)
    print(output)
