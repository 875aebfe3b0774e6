"""`realm quantize`: a model file in another type."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realm_jax.cli import options, progress
from realm_jax.cli.outputs import files_of, require_writable
from realm_jax.cli.tensor_types import tensor_type
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.quantization.file_types import FileType
    from realm_jax.quantization.requantizing import Quantization

SHOWN = 5
"""Names of tensors that a note spells out."""


def quantize(
    *,
    source: Annotated[
        str, typer.Argument(help="A GGUF path, a known name, or hf:owner/repo/file.gguf.", metavar="IN")
    ],
    target: Annotated[Path, typer.Argument(help="The file to write.", metavar="OUT.gguf")],
    kind: Annotated[
        str,
        typer.Argument(
            help="F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q2_K_S, Q3_K_S, Q3_K_M, Q3_K_L, "
            "Q4_K_S, Q4_K_M, Q5_K_S, Q5_K_M, Q6_K, IQ4_NL, MXFP4 (every matrix but the head) or MXFP4_MOE "
            "(experts; the rest Q8_0). Q3_K, Q4_K and Q5_K stand for the _M mixes.",
            metavar="TYPE",
        ),
    ],
    imatrix: Annotated[
        Path | None,
        typer.Option("--imatrix", help="An importance matrix, as realm imatrix makes it.", metavar="FILE"),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--output-tensor-type",
            help="Type of the head (output.weight), also where it is the embedding.  [default: the mix's]",
            metavar="TYPE",
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(
            "--token-embedding-type", help="Type of token_embd.weight.  [default: the mix's]", metavar="TYPE"
        ),
    ] = None,
    pure: Annotated[bool, typer.Option("--pure", help="No mix: all matrices in TYPE.")] = False,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="Also from types that are rounded already; it loses more."),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option("-t", "--threads", min=1, help="Threads that compute.  [default: all]", metavar="N"),
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Write a model in a smaller type: llama.cpp's mixes, and its bits.

    Tensors are read and written one after another, so memory stays small. All metadata is kept.

    Example: realm quantize model-bf16.gguf model-q4_k_m.gguf Q4_K_M --imatrix imatrix.gguf
    """
    from realm_jax import gguf, hub
    from realm_jax.quantization import importance
    from realm_jax.quantization.requantizing import Quantization

    file_type = _file_type(kind)
    with gguf.open(hub.resolve(source, offline=offline)) as file:
        require_writable(target, [*files_of(file), *filter(None, [imatrix])])
        job = Quantization(
            file,
            file_type,
            importance=None if imatrix is None else importance.read(imatrix),
            head=tensor_type("--output-tensor-type", head),
            embedding=tensor_type("--token-embedding-type", embedding),
            pure=pure,
            allow_requantize=allow_requantize,
            threads=threads,
        )
        job.check()
        _say(job)
        job.write(target, progress.of_tensors(len(file.tensors)))
        print(job.summary(), file=sys.stderr)
    print(target)


def _file_type(text: str) -> "FileType":
    from realm_jax.quantization.file_types import ALIASES, FILE_TYPES

    name = text.upper()
    found = FILE_TYPES.get(ALIASES.get(name, name))
    if found is None:
        raise RequestError(f"TYPE is {text!r}; it is one of {', '.join((*FILE_TYPES, *ALIASES))}")
    return found


def _say(job: "Quantization") -> None:
    """What is not as asked for, on stderr."""
    by_kinds: dict[str, list[str]] = {}
    for name, (wanted, actual) in job.fallbacks.items():
        columns = job.file.tensors[name].shape[-1]
        by_kinds.setdefault(f"rows of {columns} do not fit {wanted.name}, {actual.name} instead", []).append(
            name
        )
    for what, names in by_kinds.items():
        print(f"note: {what}: {_some(names)}", file=sys.stderr)
    if names := job.unweighted:
        print(f"note: not in the importance matrix: {_some(names)}", file=sys.stderr)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
