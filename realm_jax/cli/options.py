"""Flags that several commands share, in groups: a command takes a group as one parameter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from realm_jax.cli.adapters import scaled
from realm_jax.cli.flags import flag
from realm_jax.config import size_in_bytes
from realm_jax.errors import RequestError

FROM_FILE = "{} or the file's"

Model = Annotated[
    str | None,
    flag(
        "-m --model",
        "A GGUF path, a known name (realm models list), or hf:owner/repo/file.gguf.",
        metavar="REF",
        default="smollm2-135m-instruct",
    ),
]
Offline = Annotated[bool, flag("--offline", "Never touch the network.")]
System = Annotated[str | None, flag("--system", "A system message.", metavar="TEXT")]
CtxSize = Annotated[
    int | None,
    flag(
        "-c --ctx-size",
        "Tokens a sequence may hold.",
        metavar="N",
        default="the model's context, at most 4096",
    ),
]
Device = Annotated[Literal["auto", "cpu", "gpu", "tpu"], flag("--device", "Where to run.")]
MeshFlag = Annotated[
    str | None,
    flag(
        "--mesh",
        "Divide the model over N devices, which compute each token together.",
        metavar="tp=N",
        default="one device",
    ),
]
DType = Annotated[Literal["auto", "bfloat16", "float32"], flag("--dtype", "Arithmetic.")]
Weights = Annotated[
    Literal["auto", "dense", "quantized", "int8"],
    flag("--weights", "Storage of weights: expanded, the file's own codes, or rounded to 8 bits."),
]
Kernels = Annotated[
    Literal["auto", "reference", "xla", "pallas", "native"],
    flag("--kernels", "Who multiplies: C++ (CPU), Pallas (GPU, TPU), XLA alone, or plain formulas."),
]
MaxNumSeqs = Annotated[int, typer.Option("--max-num-seqs", help="Sequences that run at once.", metavar="N")]
MaxLoras = Annotated[int, typer.Option("--max-loras", help="Adapters on the device at once.", metavar="N")]
MaxLoraRank = Annotated[
    int | None,
    typer.Option("--max-lora-rank", help="Make room for this rank.  [default: the adapters']", metavar="N"),
]
KVDType = Annotated[
    Literal["auto", "bfloat16", "float32", "int8"], flag("--kv-dtype", "Storage of the KV cache.")
]

SpecType = Annotated[
    Literal["auto", "none", "ngram", "draft"],
    flag(
        "--spec-type",
        "Who guesses tokens ahead: the text itself (ngram), or the draft model; auto: that, if any.",
    ),
]
SpecTokens = Annotated[
    int, flag("--spec-tokens", "Tokens to guess at most; fewer where guesses are wrong.", metavar="N")
]


@dataclass(frozen=True)
class SamplingFlags:
    """How to choose tokens and when to stop: `SamplingParams`, with None where the file may have a hint."""

    max_tokens: Annotated[
        int | None,
        flag(
            "-n --max-tokens",
            "Stop after so many tokens.",
            metavar="N",
            default="an end token or the context's end",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        flag("--temperature", "0 = greedy.", metavar="X", default=FROM_FILE.format(0.8)),
    ] = None
    top_k: Annotated[int | None, flag("--top-k", "0 = off.", metavar="N", default=FROM_FILE.format(40))] = (
        None
    )
    top_p: Annotated[
        float | None, flag("--top-p", "1 = off.", metavar="X", default=FROM_FILE.format(0.95))
    ] = None
    min_p: Annotated[
        float | None, flag("--min-p", "0 = off.", metavar="X", default=FROM_FILE.format(0.05))
    ] = None
    repetition_penalty: Annotated[
        float | None, flag("--repeat-penalty", "1 = off.", metavar="X", default=FROM_FILE.format(1))
    ] = None
    presence_penalty: Annotated[float, flag("--presence-penalty", "0 = off.", metavar="X")] = 0.0
    frequency_penalty: Annotated[float, flag("--frequency-penalty", "0 = off.", metavar="X")] = 0.0
    seed: Annotated[
        int | None,
        flag("-s --seed", "Of the random numbers.", metavar="N", default="a new one, printed"),
    ] = None
    stop: Annotated[
        list[str] | None, flag("--stop", "Text that ends the answer; repeatable.", metavar="TEXT")
    ] = None


@dataclass(frozen=True)
class EngineFlags:
    """Which model to run, and how: `EngineConfig`, whose names these are."""

    model: Model = None
    ctx_size: CtxSize = None
    threads: Annotated[int | None, flag("-t --threads", "CPU threads.", metavar="N", default="all")] = None
    mesh: MeshFlag = None
    device: Device = "auto"
    memory: Annotated[
        str | None,
        flag(
            "--memory",
            "Refuse to start if weights and caches may need more: 800M, 2.5G.",
            metavar="SIZE",
            default="no limit",
        ),
    ] = None
    dtype: DType = "auto"
    weights: Weights = "auto"
    kernels: Kernels = "auto"
    kv_dtype: KVDType = "auto"
    lora: Annotated[
        list[str] | None,
        flag(
            "--lora",
            "An adapter (GGUF or PEFT) to fold into the weights; with NAME=, one that requests may name "
            "(realm batch). Repeatable.",
            metavar="PATH[:SCALE] | NAME=PATH",
        ),
    ] = None
    draft_model: Annotated[
        str | None,
        flag(
            "--draft-model",
            "A smaller model of the same vocabulary, which guesses tokens ahead: the same output, sooner.",
            metavar="REF",
        ),
    ] = None
    spec_type: SpecType = "auto"
    spec_tokens: SpecTokens = 7
    deterministic: Annotated[
        bool,
        flag(
            "--deterministic",
            "The same bits whatever runs beside a request, on every backend (on CPU that is so anyway).",
        ),
    ] = False
    offline: Offline = False


def adapters(values: list[str] | None) -> dict[str, Any]:
    """`lora` and `fold` of `LLM`, of the values of --lora."""
    named: dict[str, Path] = {}
    folded: list[tuple[Path, float]] = []
    for value in values or ():
        name, equals, path = value.partition("=")
        if not equals or not name or "/" in name or Path(value).exists():
            folded.append(scaled(value))
        elif name in named:
            raise RequestError(f"--lora {value}: adapter {name!r} is named twice; choose another name")
        else:
            named[name] = Path(path)
    return {"lora": named, "fold": folded}


def memory_bytes(text: str | None) -> int | None:
    """Bytes of a size such as 800M or 2.5G, in powers of ten; a bare number is bytes."""
    if text is None:
        return None
    return size_in_bytes(text, "--memory")
