"""Flags that several commands share. Precedence: flag, REALM_* variable, --config file, default."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import typer

from realm_jax.errors import RequestError


def _read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Values of a TOML file become defaults of this command's flags."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"--config {path}: {error}") from error
    values = {key.replace("-", "_"): value for key, value in values.items()}
    known = {parameter.name for parameter in context.command.params}
    if unknown := sorted(values.keys() - known):
        raise RequestError(f"--config {path}: unknown key {', '.join(unknown)}")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def _be_verbose(wanted: bool) -> bool:
    if wanted:
        os.environ["REALM_VERBOSE"] = "1"
    return wanted


def _option(flags: str, text: str, **settings: object) -> typer.models.OptionInfo:
    names = flags.split()
    variable = "REALM_" + max(names, key=len).lstrip("-").replace("-", "_").upper()
    return typer.Option(*names, help=text, envvar=variable, show_envvar=False, **settings)  # pyright: ignore[reportArgumentType, reportCallIssue]


DTypeName = Literal["auto", "bfloat16", "float32"]

Model = Annotated[
    str | None,
    _option(
        "-m --model",
        "A GGUF path, a known name (realm models list), or hf:owner/repo/file.gguf.",
        metavar="REF",
    ),
]
CtxSize = Annotated[
    int | None,
    _option(
        "-c --ctx-size",
        "Tokens a sequence may hold [default: the model's context, at most 4096].",
        metavar="N",
    ),
]
Threads = Annotated[int | None, _option("-t --threads", "CPU threads [default: all].", metavar="N")]
Device = Annotated[Literal["auto", "cpu", "gpu", "tpu"], _option("--device", "Where to run.")]
DType = Annotated[DTypeName, _option("--dtype", "Arithmetic.")]
Weights = Annotated[Literal["auto", "dense"], _option("--weights", "Storage of weights.")]
KVDType = Annotated[DTypeName, _option("--kv-dtype", "Storage of the KV cache.")]
Offline = Annotated[bool, _option("--offline", "Never touch the network.")]
Config = Annotated[
    Path | None,
    _option(
        "--config",
        "A TOML file with values for these flags.",
        is_eager=True,
        callback=_read_config,
        metavar="FILE",
    ),
]
Verbose = Annotated[
    bool, _option("-v --verbose", "Say more; show tracebacks.", is_eager=True, callback=_be_verbose)
]

Temperature = Annotated[
    float | None, _option("--temperature", "0 = greedy [default: 0.8, or the file's].", metavar="X")
]
TopK = Annotated[int | None, _option("--top-k", "0 = off [default: 40, or the file's].", metavar="N")]
TopP = Annotated[float | None, _option("--top-p", "1 = off [default: 0.95, or the file's].", metavar="X")]
MinP = Annotated[float | None, _option("--min-p", "0 = off [default: 0.05, or the file's].", metavar="X")]
RepeatPenalty = Annotated[
    float | None, _option("--repeat-penalty", "1 = off [default: 1, or the file's].", metavar="X")
]
PresencePenalty = Annotated[float, _option("--presence-penalty", "0 = off.", metavar="X")]
FrequencyPenalty = Annotated[float, _option("--frequency-penalty", "0 = off.", metavar="X")]
Seed = Annotated[
    int | None, _option("-s --seed", "Of the random numbers [default: a new one, printed].", metavar="N")
]
MaxTokens = Annotated[
    int | None,
    _option(
        "-n --max-tokens", "Stop after so many [default: at the end token or context's end].", metavar="N"
    ),
]
Stop = Annotated[
    list[str] | None, _option("--stop", "Text that ends the answer; repeatable.", metavar="TEXT")
]
System = Annotated[str | None, _option("--system", "A system message.", metavar="TEXT")]
