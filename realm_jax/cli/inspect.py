"""`realm inspect`: what a model file holds."""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from realm_jax.cli import options
from realm_jax.errors import ModelFileError

if TYPE_CHECKING:
    from realm_jax.gguf import GGUFFile

Reference = Annotated[
    str | None,
    typer.Argument(
        help="A path, a known name or hf:owner/repo/file.gguf [default: the default model].", metavar="REF"
    ),
]


def inspect(
    reference: Reference = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Expand every tensor and look for broken values.")
    ] = False,
    offline: options.Offline = False,
    verbose: options.Verbose = False,
) -> None:
    """Show a model's architecture, sizes, quantization, memory, tokenizer and template.

    Example: realm inspect smollm2-135m-instruct --check
    """
    from realm_jax import gguf, hub, inspection

    path = hub.resolve(reference, offline=offline)
    with gguf.open(path) as file:
        facts = inspection.describe(file)
        if tensors:
            facts["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "type": t.ggml_type.name, "bytes": t.nbytes}
                for t in file.tensors.values()
            ]
        if check:
            facts["problems"] = [dataclasses.asdict(problem) for problem in _check(file)]
    if as_json:
        print(json.dumps(facts))
    else:
        _print(facts)
    if facts.get("problems"):
        raise ModelFileError(f"{path.name}: {len(facts['problems'])} tensors are broken")


def _check(file: "GGUFFile") -> list[Any]:
    """The problems, with progress on stderr."""
    from rich.progress import track

    from realm_jax import inspection

    total = len(file.tensors)
    if not sys.stderr.isatty():
        print(f"checking {total} tensors", file=sys.stderr)
        return inspection.check(file)
    bar = iter(track(range(total), "checking", console=Console(stderr=True), transient=True))
    next(bar)
    return inspection.check(file, lambda _: next(bar, None))


def _print(facts: dict[str, Any]) -> None:
    console = Console(soft_wrap=True)
    table = Table(show_header=False, box=None)
    for key in ("file", "name", "architecture", "layers", "hidden_size", "heads", "kv_heads", "head_dim"):
        table.add_row(key.replace("_", " "), str(facts[key]))
    for key in ("ffn_size", "experts", "vocab_size", "context_length", "parameters"):
        table.add_row(key.replace("_", " "), f"{facts[key]:,}")
    mix = ", ".join(f"{kind} {_size(nbytes)}" for kind, nbytes in facts["quantization"].items())
    table.add_row("quantization", mix)
    table.add_row("file size", _size(facts["file_bytes"]))
    for dtype, need in facts["memory_bytes"].items():
        cache = _size(need["cache_per_1024_tokens"])
        table.add_row(f"memory, {dtype}", f"{_size(need['weights'])} weights, {cache} cache per 1,024 tokens")
    table.add_row("tokenizer", facts["tokenizer"])
    table.add_row("chat template", "yes" if facts["chat_template"] else "none (use --raw)")
    console.print(table)
    for tensor in facts.get("tensors", ()):
        shape = " x ".join(map(str, tensor["shape"]))
        console.print(f"{tensor['name']:40} {tensor['type']:8} {shape:20} {_size(tensor['bytes'])}")
    if "problems" in facts:
        for problem in facts["problems"]:
            console.print(f"{problem['tensor']}: {problem['what']}")
        console.print(
            f"{len(facts['problems'])} problems found" if facts["problems"] else "all tensors are sound"
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
