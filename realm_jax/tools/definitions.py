"""What a request says of tools: OpenAI's `tools`, `tool_choice` and `parallel_tool_calls`, checked."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from realm_jax.errors import RequestError

MAX_TOOLS = 128
MAX_BYTES = 44 << 10
"""Of all tools, as JSON: their grammar then fits into what a grammar may have."""

MAX_DEPTH = 32
MAX_DESCRIPTION = 8192
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""What a function without parameters takes."""


@dataclass(frozen=True)
class Function:
    """A function that may be called; parameters: the JSON schema of the object that it takes."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def shown(self) -> dict[str, Any]:
        """As templates want it: with all fields, because many add them to a text."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}


@dataclass(frozen=True)
class Toolset:
    """The functions of a request, at least one.

    forced: those of which one must be called; None where the model decides. several: whether one answer may
    have more than one call.
    """

    functions: tuple[Function, ...]
    forced: tuple[str, ...] | None = None
    several: bool = True

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)

    @property
    def callable(self) -> tuple[Function, ...]:
        """Those that this answer may call."""
        names = self.names if self.forced is None else self.forced
        return tuple(function for function in self.functions if function.name in names)


def read_tools(body: Mapping[str, Any]) -> Toolset | None:
    """The tools that a request brings; None without, and where it says that none may be called.

    Raises RequestError that names the field.
    """
    given, choice = body.get("tools"), body.get("tool_choice")
    parallel = body.get("parallel_tool_calls")
    if not isinstance(parallel, bool | None):
        raise RequestError(f"parallel_tool_calls is {_shown(parallel)}; it must be true or false")
    if given is None or given == []:
        if choice not in (None, "none", "auto"):
            raise RequestError(f"tool_choice is {_shown(choice)}, and there are no tools; give tools, too")
        return None
    functions = _functions(given)
    if choice == "none":
        return None
    forced = _forced(choice, functions)
    one_alone = isinstance(choice, Mapping)  # a function is named: it is called once
    return Toolset(functions, forced, several=parallel is not False and not one_alone)


def _functions(given: object) -> tuple[Function, ...]:
    if not isinstance(given, list):
        raise RequestError(f"tools is {_shown(given)}; it must be a list of objects")
    if len(given) > MAX_TOOLS:
        raise RequestError(f"tools has {len(given):,} entries; the limit is {MAX_TOOLS}")
    for i, each in enumerate(given):
        _check_depth(f"tools[{i}]", each)
    try:
        size = len(json.dumps(given, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        raise RequestError(f"tools cannot be written as JSON: {str(error)[:100]}") from None
    if size > MAX_BYTES:
        raise RequestError(f"tools has {size:,} bytes as JSON; the limit is {MAX_BYTES:,}")
    functions = tuple(_function(f"tools[{i}]", each) for i, each in enumerate(given))
    names = [function.name for function in functions]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise RequestError(f"tools has two functions {twice!r}; names must be distinct")
    return functions


def _function(where: str, tool: object) -> Function:
    if not isinstance(tool, Mapping):
        raise RequestError(f'{where} is {_shown(tool)}; it must be an object with type "function"')
    if tool.get("type") != "function":
        raise RequestError(f'{where}.type is {_shown(tool.get("type"))}; only "function" is served')
    _refuse_unknown(where, tool, ("type", "function"))
    if not isinstance(function := tool.get("function"), Mapping):
        raise RequestError(f"{where}.function is {_shown(function)}; it must be an object with a name")
    where += ".function"
    _refuse_unknown(where, function, ("name", "description", "parameters", "strict"))
    if not isinstance(name := function.get("name"), str) or NAME.fullmatch(name) is None:
        raise RequestError(
            f"{where}.name is {_shown(name)}; give 1 to 64 letters, digits, dots, dashes or underscores"
        )
    description = function.get("description")
    if not isinstance(description, str | None) or len(description or "") > MAX_DESCRIPTION:
        raise RequestError(f"{where}.description must be a text of at most {MAX_DESCRIPTION:,} characters")
    if not isinstance(function.get("strict"), bool | None):
        raise RequestError(f"{where}.strict is {_shown(function['strict'])}; it must be true or false")
    return Function(name, description or "", _parameters(where, function.get("parameters")))


def _parameters(where: str, given: object) -> Mapping[str, Any]:
    """The schema of an object, said so."""
    if given is None:
        return NOTHING
    if not isinstance(given, Mapping) or given.get("type", "object") != "object":
        raise RequestError(f'{where}.parameters is {_shown(given)}; it must be a schema of type "object"')
    if not isinstance(given.get("properties", {}), Mapping):
        raise RequestError(f"{where}.parameters.properties must be an object")
    return {"properties": {}, **given, "type": "object"}


def _forced(choice: object, functions: tuple[Function, ...]) -> tuple[str, ...] | None:
    names = tuple(function.name for function in functions)
    match choice:
        case None | "auto":
            return None
        case "required":
            return names
        case {"type": "function", "function": {"name": str(name)}}:
            if name not in names:
                raise RequestError(f"tool_choice names {name[:60]!r}; tools has {', '.join(names)[:200]}")
            return (name,)
    raise RequestError(
        f'tool_choice is {_shown(choice)}; it must be "auto", "none", "required", or '
        '{"type": "function", "function": {"name": ...}}'
    )


def _refuse_unknown(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    if (unknown := next((name for name in given if name not in known), None)) is not None:
        raise RequestError(f"{where} has {str(unknown)[:60]!r}; known: {', '.join(known)}")


def _check_depth(where: str, value: object) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = (each for each in level if isinstance(each, Mapping | list))
        level = [x for each in nested for x in (each.values() if isinstance(each, Mapping) else each)]
        if not level:
            return
    raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep; make it flatter")


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
