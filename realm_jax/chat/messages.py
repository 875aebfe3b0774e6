"""Messages as templates may see them: checked, their contents texts, all values JSON's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from realm_jax.errors import RequestError

MAX_CALLS = 128
"""Calls in one message."""


def one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else text[:297] + "..."


def plain(variables: dict[str, Any]) -> dict[str, Any]:
    """The same in JSON's types, so that a template sees no other objects, wherever it runs."""
    for name, value in variables.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"{name} cannot be written as JSON: {one_line(str(error))}") from None
    return json.loads(json.dumps(variables))


def checked(messages: Any) -> list[dict[str, Any]]:
    """The messages, contents given in parts joined to one text, as most templates want it."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise RequestError("messages must be a list of at least one message")
    return [_checked_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _checked_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is of type {type(message).__name__}; it must have a role and a content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f"{where}.role is {_shown(role)}; it must be a text like 'user'")
    if message.get("tool_calls"):
        message = {**message, "tool_calls": _tool_calls(where, message["tool_calls"])}
        if content is None:
            return dict(message)
    elif "tool_calls" in message:  # templates ask whether there are any by the name alone
        message = {name: value for name, value in message.items() if name != "tool_calls"}
    if isinstance(content, list):
        content = "\n".join(_text_of(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{where}.content is {_shown(content)}; it must be a text or a list of text parts")
    return {**message, "content": content}


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """The calls of a message, their arguments as objects, which templates write as JSON."""
    where += ".tool_calls"
    if not isinstance(calls, Sequence) or isinstance(calls, str) or len(calls) > MAX_CALLS:
        raise RequestError(f"{where} is {_shown(calls)}; it must be a list of at most {MAX_CALLS} calls")
    return [_tool_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _tool_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where} is {_shown(call)}; it must have a function with a name and arguments")
    arguments = function.get("arguments")
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}.function.arguments is no JSON: {one_line(str(error))}") from None
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{where}.function.arguments is {_shown(arguments)}; it must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _text_of(where: str, part: Any) -> str:
    if not isinstance(part, Mapping):
        raise RequestError(f"{where} is {_shown(part)}; it must have a type and a text")
    if part.get("type") != "text":
        raise RequestError(f"{where}.type is {_shown(part.get('type'))}; only 'text' is served")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where}.text is {_shown(part.get('text'))}; it must be a text")
    return part["text"]


def _shown(value: Any) -> str:
    return "missing" if value is None else one_line(repr(value))[:60]
