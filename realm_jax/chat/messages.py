"""Messages as templates may see them: checked, their contents texts, all values JSON's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from realm_jax.errors import RequestError


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
    if content is None and message.get("tool_calls"):
        return dict(message)
    if isinstance(content, list):
        content = "\n".join(_text_of(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"{where}.content is {_shown(content)}; it must be a text or a list of text parts")
    return {**message, "content": content}


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
