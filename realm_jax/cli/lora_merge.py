"""`realm lora merge`: adapters folded into a model file."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from realm_jax.cli import options, progress
from realm_jax.cli.adapters import opened_base, scaled
from realm_jax.cli.flags import flag
from realm_jax.cli.outputs import files_of, require_writable
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
        Literal["f32", "f16", "bf16", "q8_0", "q4_0"] | None,
        typer.Option(
            "--type",
            help="The type of all matrices.  [default: each keeps its type, but changed ones that were "
            "quantized take f16]",
            show_default=False,
        ),
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Fold adapters into a model: W + scale * B A. Several add.

    Tensors are read and written one after another, so memory stays small. All metadata is kept.

    Example: realm lora merge -m model.gguf --lora adapter.gguf:0.5 -o merged.gguf
    """
    from realm_jax.lora import read
    from realm_jax.lora.merge import Merge

    if not lora:
        raise RequestError("nothing to merge; give at least one --lora PATH[:SCALE]")
    with opened_base(model, offline=offline) as (file, base):
        require_writable(output, [*files_of(file), *(path for path, _ in map(scaled, lora))])
        adapters = [(read(path, base), scale) for path, scale in map(scaled, lora)]
        Merge(file, adapters, kind).write(output, progress.of_tensors(len(file.tensors)))
        changed = sum(any(adapter.changes(name) for adapter, _ in adapters) for name in file.tensors)
    print(f"{changed} of {len(base.shapes)} tensors changed", file=sys.stderr)
    print(output)
