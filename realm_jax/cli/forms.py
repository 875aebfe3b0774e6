"""Flags that say what form an answer must have."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from realm_jax.cli.text import read_text
from realm_jax.errors import RequestError
from realm_jax.structured import StructuredOutput


@dataclass(frozen=True)
class FormFlags:
    """`StructuredOutput`, of which at most one field may be given."""

    json_schema: Annotated[
        str | None,
        typer.Option(
            "-j",
            "--json-schema",
            help="The answer is JSON that this schema accepts: a file or the schema.",
            metavar="FILE|JSON",
        ),
    ] = None
    json_object: Annotated[bool, typer.Option("--json-object", help="The answer is a JSON object.")] = False
    regex: Annotated[
        str | None,
        typer.Option("--regex", help="The answer matches this expression, all of it.", metavar="PATTERN"),
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option(
            "--grammar",
            help="The answer is one of this grammar's, Lark or GBNF: a file or the grammar.",
            metavar="FILE|TEXT",
        ),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option("--choice", help="The answer is one of these; repeat it.", metavar="TEXT"),
    ] = None


def read_form(flags: FormFlags) -> StructuredOutput | None:
    """The form that the flags ask for, if any. Raises RequestError."""
    given: dict[str, Any] = {
        field.name: value for field in fields(flags) if (value := getattr(flags, field.name))
    }
    if len(given) > 1:
        raise RequestError(f"{' and '.join(_flag(name) for name in given)} exclude each other; give one")
    if not given:
        return None
    name, value = next(iter(given.items()))
    if name == "json_schema" and not value.lstrip().startswith("{"):
        value = read_text(Path(value), "--json-schema")
    if name == "grammar" and "::=" not in value and "start:" not in value:
        value = read_text(Path(value), "--grammar")
    given[name] = value
    return StructuredOutput(**given)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
