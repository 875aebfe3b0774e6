"""`realm inspect`: what a model file holds."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realm_jax.cli import options
from realm_jax.cli.text import size, table
from realm_jax.errors import ModelFileError

if TYPE_CHECKING:
    from realm_jax.gguf import GGUFFile

Reference = Annotated[
    str | None,
    typer.Argument(
        help="A path, a known name or hf:owner/repo/file.gguf.",
        metavar="REF",
        show_default="smollm2-135m-instruct",
    ),
]


def inspect(
    *,
    reference: Reference = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Expand every tensor and look for broken values.")
    ] = False,
    offline: options.Offline = False,
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
        count = len(facts["problems"])
        raise ModelFileError(f"{path.name}: {count} tensor{'s are' if count > 1 else ' is'} broken")


def _check(file: "GGUFFile") -> list[Any]:
    """The problems, with progress on stderr."""
    from rich.console import Console
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
    print(table((*_rows(facts), *_memory_rows(facts))))
    if facts.get("tensors"):
        print()
        print(
            table(
                (t["name"], t["type"], " x ".join(map(str, t["shape"])), size(t["bytes"]))
                for t in facts["tensors"]
            )
        )
    if "problems" in facts:
        print("\n".join(f"{problem['tensor']}: {problem['what']}" for problem in facts["problems"]))
        if not facts["problems"]:
            print("all tensors are sound")


def _rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "file", f"{facts['file']} ({size(facts['file_bytes'])})"
    if facts["name"]:
        yield "name", str(facts["name"])
    yield "architecture", facts["architecture"]
    for key in ("parameters", "layers", "hidden_size", "heads", "kv_heads", "head_dim", "ffn_size"):
        yield key.replace("_", " "), f"{facts[key]:,}"
    if facts["experts"]:
        yield "experts", f"{facts['experts']:,}"
    yield "context length", f"{facts['context_length']:,}"
    yield "tokenizer", f"{facts['tokenizer']}, {facts['vocab_size']:,} tokens"
    yield "chat template", "yes" if facts["chat_template"] else "none (use --raw)"
    mix = ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in facts["quantization"].items())
    yield "quantization", mix


def _memory_rows(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run needs with each storage, and where that is the default."""
    for storage, need in facts["memory_bytes"].items():
        backends = [backend for backend, default in facts["default_storage"].items() if default == storage]
        default = f" (default on {', '.join(backends)})" if backends else ""
        cache = size(need["cache_per_1024_tokens"])
        state = f", state {size(need['state_per_sequence'])}" if need["state_per_sequence"] else ""
        yield (
            f"memory, {storage}",
            f"weights {size(need['weights'])}, cache {cache} per 1,024 tokens{state}{default}",
        )
