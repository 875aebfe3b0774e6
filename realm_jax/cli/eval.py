"""`realm eval`: tasks of lm-evaluation-harness, run by its own command line."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from realm_jax.cli import options
from realm_jax.errors import RealmError, RequestError

REFUSED = {
    "model": "-M is lm_eval's; the model is -m/--model here",
    "model_args": "--model_args is lm_eval's; give realm's own flags here, such as --ctx-size or --dtype",
    "max_batch_size": "--max_batch_size has no meaning here; --max-num-seqs bounds how many sequences run",
}


def evaluate(
    *,
    tasks: Annotated[
        list[str] | None,
        typer.Argument(help="Tasks, and then flags of lm_eval.", metavar="TASKS"),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", "--include_path", help="A folder of more tasks.", metavar="DIR"),
    ] = None,
    max_num_seqs: Annotated[
        int,
        typer.Option("-b", "--max-num-seqs", "--batch_size", help="Sequences that run at once.", metavar="N"),
    ] = 32,
    engine: options.EngineFlags,
) -> None:
    """Evaluate the model on tasks of lm-evaluation-harness (lm_eval).

    Flags that are not below are lm_eval's: --limit, --num_fewshot, --apply_chat_template, --gen_kwargs,
    --output_path, --log_samples and others; lm_eval run --help has them all.

    Example: realm eval arc_easy hellaswag --limit 100 --num_fewshot 5
    """
    if include_path is not None and not include_path.is_dir():
        raise RequestError(f"--include-path {include_path}: no such folder")

    given = _model_options(engine) | {"max_num_seqs": max_num_seqs}
    parsed = _parsed(tasks or [])
    parsed.model, parsed.model_args = "realm", given
    parsed.device, parsed.batch_size = engine.device, max_num_seqs  # for the report
    parsed.include_path = None if include_path is None else str(include_path)
    try:
        parsed.func(parsed)
    except RealmError:
        raise
    except Exception as error:  # tasks, metrics and data sets are others' programs: what they raise is theirs
        kind = RequestError if isinstance(error, ValueError) else RealmError
        raise kind(f"lm_eval: {error or type(error).__name__}") from error


def _model_options(engine: options.EngineFlags) -> dict[str, Any]:
    """The arguments of `LLM` that were given; lm_eval's report names them."""
    from realm_jax import hub

    fields = dataclasses.fields(engine)
    given = {f.name: value for f in fields if (value := getattr(engine, f.name)) != f.default}
    if "memory" in given:
        given["memory"] = options.memory_bytes(given["memory"])
    if values := given.pop("lora", None):
        if (parsed := options.adapters(values))["lora"]:
            raise RequestError("--lora NAME=PATH: a task names no adapters; fold one with --lora PATH")
        given["fold"] = parsed["fold"]
    return {"model": hub.DEFAULT_MODEL} | given


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """What lm_eval's own parser makes of the arguments; what it leaves over are tasks."""
    from realm_jax.evaluation import lm_eval_needed

    with lm_eval_needed():
        from lm_eval._cli.run import Run
        from lm_eval.utils import setup_logging

    setup_logging()
    parser = _Parser(add_help=False)
    Run.create(parser.add_subparsers())
    try:
        parsed, rest = parser.parse_known_args(["run", *map(_underscored, arguments)])
    except ValueError as error:
        raise RequestError(str(error)) from error
    if unknown := [argument for argument in rest if argument.startswith("-")]:
        raise RequestError(f"no such option: {unknown[0]}; see realm eval --help and lm_eval run --help")
    for name, message in REFUSED.items():
        if getattr(parsed, name) is not None:
            raise RequestError(message)
    parsed.tasks = [*rest, *(parsed.tasks or [])]
    if not parsed.tasks and parsed.config is None:
        raise RequestError("no task is named; e.g. realm eval hellaswag (lm_eval ls tasks lists them)")
    return parsed


class _Parser(argparse.ArgumentParser):
    """Of lm_eval's flags; errors are ours."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see lm_eval run --help")


def _underscored(argument: str) -> str:
    """--num-fewshot=5 as lm_eval spells it: --num_fewshot=5."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value
