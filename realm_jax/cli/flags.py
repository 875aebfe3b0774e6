"""How flags are made: their REALM_* variables, groups of them, and values from a TOML file.

Precedence: flag, REALM_* variable, --config file, default.
"""

import functools
import inspect
import logging
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from realm_jax.errors import RequestError


@dataclass
class Run:
    """What `main` learns from the flags while they are read."""

    verbose: bool = False


def flag(names: str, text: str, *, default: object = None, **settings: Any) -> typer.models.OptionInfo:
    """An option that REALM_ and its longest name, in capitals, sets too.

    default: what to say of a default that the model decides.
    """
    if default is not None:
        text, settings["show_default"] = f"{text}  [default: {default}]", False
    decls = names.split()
    variable = "REALM_" + max(decls, key=len).lstrip("-").replace("-", "_").upper()
    return typer.Option(*decls, help=text, envvar=variable, show_envvar=False, **settings)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as a command: a parameter that is a dataclass of flags becomes these flags.

    Every command also takes --config and --verbose, which the function does not see.
    """
    parameters = inspect.signature(function).parameters
    groups: dict[str, Any] = {
        name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)
    }
    given: dict[str, tuple[Any, Any]] = {}
    for name, parameter in parameters.items():
        if name in groups:
            given |= {field.name: (field.type, field.default) for field in fields(groups[name])}
        else:
            given[name] = (parameter.annotation, parameter.default)
    given |= {"config": (Config, None), "verbose": (Verbose, False)}

    @functools.wraps(function)
    def run(**values: Any) -> None:
        del values["config"], values["verbose"]  # their callbacks have done their work
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        function(**values)

    run.__signature__ = inspect.Signature(  # pyright: ignore[reportAttributeAccessIssue]: what Typer reads
        [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for name, (kind, default) in given.items()
        ]
    )
    run.__annotations__ = {name: kind for name, (kind, _) in given.items()}
    return run


def _be_verbose(context: Any, wanted: bool) -> bool:
    context.find_object(Run).verbose = wanted
    if wanted and logging.lastResort is not None:
        logging.getLogger("realm_jax").setLevel(logging.INFO)
        logging.lastResort.setLevel(logging.INFO)  # it writes to stderr, as others' warnings are
    return wanted


def _read_config(context: Any, path: Path | None) -> Path | None:
    """Values of a TOML file become defaults of this command's flags; other commands' flags are let be."""
    if path is None:
        return None
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"--config {path}: {error}") from error
    values = {key.replace("-", "_"): value for key, value in values.items()}
    if unknown := sorted(values.keys() - _all_flags(context.find_root().command)):
        raise RequestError(f"--config {path}: unknown key {', '.join(unknown)}; keys are named as the flags")
    context.default_map = {
        parameter.name: _as_typed(values[key], parameter, f"--config {path}: {key}")
        for key, parameter in _flags(context.command).items()
        if key in values
    }
    return path


def _flags(command: Any) -> dict[str, Any]:
    """TOML key -> the flag that it sets."""
    named = {max(p.opts, key=len): p for p in command.params}
    return {
        name.lstrip("-").replace("-", "_"): parameter
        for name, parameter in named.items()
        if name.startswith("--") and name not in ("--config", "--help", "--verbose")
    }


def _all_flags(command: Any) -> set[str]:
    """The TOML keys of a command and of all its subcommands."""
    below = (_all_flags(each) for each in getattr(command, "commands", {}).values())
    return set(_flags(command)).union(*below)


def _as_typed(value: object, parameter: Any, where: str) -> str | list[str]:
    """The value as if typed after the flag, so that both are checked alike."""
    values = value if isinstance(value, list) and parameter.multiple else [value]
    if not all(isinstance(each, str | int | float) for each in values):
        raise RequestError(f"{where} is {value!r}; it must be a string, a number, true or false")
    texts = [str(each) for each in values]
    return texts if parameter.multiple else texts[0]


Config = Annotated[
    Path | None,
    flag(
        "--config",
        "A TOML file with values for flags: temperature = 0.5",
        is_eager=True,
        callback=_read_config,
        metavar="FILE",
    ),
]
Verbose = Annotated[
    bool,
    flag(
        "-v --verbose",
        "Show what is decided, and where an error came from.",
        is_eager=True,
        callback=_be_verbose,
    ),
]
