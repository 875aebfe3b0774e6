"""`realm lora inspect`: what an adapter changes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realm_jax.cli import options
from realm_jax.cli.adapters import opened_base
from realm_jax.cli.flags import flag
from realm_jax.cli.text import size, table
from realm_jax.errors import UnsupportedError

if TYPE_CHECKING:
    from realm_jax.lora import Adapter, Base


def inspect(
    *,
    path: Annotated[
        Path, typer.Argument(help="A GGUF file, a safetensors file, or PEFT's folder.", metavar="PATH")
    ],
    model: Annotated[
        str | None, flag("-m --model", "Check that it fits this model.", metavar="REF", default="no check")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    offline: options.Offline = False,
) -> None:
    """Show an adapter's form, rank, targets and scale; with a model, every tensor that does not fit.

    Example: realm lora inspect adapter.gguf -m smollm2-135m-instruct
    """
    from realm_jax import lora

    facts = lora.summarize(path)
    if model is not None:
        with opened_base(model, offline=offline) as (_, base):
            facts |= _fitted(lora.read(path, base), base)
    print(json.dumps(facts) if as_json else table(_rows(facts)))


def _fitted(adapter: "Adapter", base: "Base") -> dict[str, Any]:
    """What can be said once the adapter is read for a model."""
    return {
        "model": base.source,
        "scales": sorted({delta.scale for delta in adapter.deltas.values()}),
        "folded_only": _is_folded_only(adapter, base),
        "tensors": {name: delta.rank for name, delta in adapter.deltas.items()},
    }


def _is_folded_only(adapter: "Adapter", base: "Base") -> bool:
    from realm_jax.banks import check_adapter

    try:
        check_adapter(adapter, base.config)
    except UnsupportedError:
        return True
    return False


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    def counted(key: str) -> str:
        return ", ".join(f"{name} ({count})" for name, count in facts[key].items()) or "none"

    yield "file", f"{facts['file']} ({size(facts['bytes'])})"
    yield "form", facts["format"]
    if facts["architecture"]:
        yield "architecture", str(facts["architecture"])
    yield "alpha", f"{facts['alpha']:g}"
    yield "rank", counted("ranks")
    yield "targets", counted("targets")
    yield "types", counted("types")
    if facts["dora"]:
        yield "DoRA", "yes"
    if facts["whole"]:
        yield "whole tensors", ", ".join(facts["whole"])
    if "model" in facts:
        yield "fits", facts["model"]
        yield "scale", ", ".join(f"{scale:g}" for scale in facts["scales"])
        yield "applied", "folded only" if facts["folded_only"] else "folded, or by request"
