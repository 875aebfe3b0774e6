"""`realm lora convert`: an adapter from PEFT's form to GGUF, or back."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.adapters import opened_base


def convert(
    *,
    source: Annotated[
        Path, typer.Argument(help="A GGUF file, a safetensors file, or PEFT's folder.", metavar="IN")
    ],
    target: Annotated[
        Path, typer.Argument(help="A folder if IN is a GGUF file, else a .gguf file.", metavar="OUT")
    ],
    model: options.Model = None,
    offline: options.Offline = False,
) -> None:
    """Write a PEFT adapter as GGUF, or a GGUF adapter as PEFT's; the model says the order of rows.

    Values are float32 and stay what they are. Where modules have scales of their own, which GGUF cannot
    say, the difference is multiplied into B.

    Example: realm lora convert my-adapter adapter.gguf -m smollm2-135m-instruct
    """
    from realm_jax import lora
    from realm_jax.lora import export

    with opened_base(model, offline=offline) as (_, base):
        adapter = lora.read(source, base)
    if lora.is_gguf(lora.locate(source)):
        export.write_peft(adapter, base, target)
    else:
        export.write_gguf(adapter, base, target)
    print(f"{len(adapter.deltas)} changed tensors, rank {adapter.rank}", file=sys.stderr)
    print(target)
