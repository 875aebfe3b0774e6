"""Whether a model's chat template takes tools, and which family's calls it writes: by trying it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from realm_jax.chat import ChatTemplate
from realm_jax.errors import ModelFileError, RealmError, RequestError, UnsupportedError
from realm_jax.tools.definitions import Function, Toolset
from realm_jax.tools.formats import FORMATS, CallFormat
from realm_jax.tools.reader import CallReader, ToolCall, read_answer

PROBE = Function(
    "probe_function",
    "A function.",
    {
        "type": "object",
        "properties": {"probe_argument": {"type": "string", "description": "A text."}},
        "required": ["probe_argument"],
    },
)
QUESTION = {"role": "user", "content": "A question."}
CALL = {"name": PROBE.name, "arguments": {"probe_argument": "probe_value"}}
PROBED_CALL = {"id": "probecall", "type": "function", "function": CALL}  # nine letters: Mistral's rule
RESULT = {"role": "tool", "name": PROBE.name, "tool_call_id": "probecall", "content": "probe_result"}


@dataclass(frozen=True)
class ToolUse:
    """How a model is told of tools, and how it calls them.

    null_content: whether the template takes a call's message without a content; else with an empty one.
    """

    template: ChatTemplate
    format: CallFormat
    null_content: bool

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Toolset | None = None, **variables: Any
    ) -> str:
        """The text of a conversation in which there are tools, calls, or both.

        Raises RequestError where the template cannot show them.
        """
        given = [] if tools is None else [function.shown() for function in tools.functions]
        if not self.null_content:
            messages = [_with_content(message) for message in messages]
        try:
            return self.template.render(messages, tools=given or None, **variables)
        except ModelFileError as error:  # it could with the tools and the call that it was tried with
            raise RequestError(f"tools or tool_calls cannot be shown to the model: {error}") from None


def find_tool_use(templates: Iterable[ChatTemplate | None], source: str) -> ToolUse | UnsupportedError:
    """The use of the first template that takes tools, or else what to say to who brings some."""
    reason = f"tools are not served with {source}, which has no chat template"
    for template in templates:
        if template is not None:
            found = _use(template, source)
            if isinstance(found, ToolUse):
                return found
            reason = found
    return UnsupportedError(f"{reason}; leave them out, or choose another model")


def _use(template: ChatTemplate, source: str) -> ToolUse | str:
    tools = [PROBE.shown()]
    without, prompt = _text(template, [QUESTION], None), _text(template, [QUESTION], tools)
    if prompt is None or PROBE.name not in prompt or PROBE.name in (without or ""):
        return f"tools are not served with {source}: its chat template ignores them"
    before = _text(template, [QUESTION], tools, add_generation_prompt=False) or ""
    for content in (None, ""):
        called = {"role": "assistant", "content": content, "tool_calls": [PROBED_CALL]}
        text = _text(template, [QUESTION, called], tools, add_generation_prompt=False)
        whole = _text(template, [QUESTION, called, RESULT], tools)
        if text is None or whole is None or RESULT["content"] not in whole:
            continue
        if content is None and "None" in _behind(before, text):  # it shows the absence of one
            continue
        for format in FORMATS:
            if _reads_back(format, _behind(prompt if format.opens is None else before, text)):
                return ToolUse(template, format, null_content=content is None)
    known = ", ".join(format.name for format in FORMATS)
    return f"tools are not served with {source}: its chat template writes calls in none of the forms {known}"


def _reads_back(format: CallFormat, text: str) -> bool:
    """Whether the format's reader finds the call in what the template writes of it."""
    if f'"{format.arguments}"' not in text:  # readers take either name
        return False
    _, calls = read_answer(CallReader(format, (PROBE.name,), constrained=False), text)
    return calls == [ToolCall(PROBE.name, '{"probe_argument": "probe_value"}')]


def _behind(beginning: str, text: str) -> str:
    """The text from where it departs from another; without a marker, calls begin where the answer does."""
    same = next((i for i, (a, b) in enumerate(zip(beginning, text, strict=False)) if a != b), len(beginning))
    return text[same:]


def _text(template: ChatTemplate, messages: list[Any], tools: Any, **variables: Any) -> str | None:
    try:
        return template.render(messages, tools=tools, **variables)
    except RealmError:
        return None


def has_calls(messages: object) -> bool:
    """Whether a message of the conversation, not checked yet, has calls."""
    if not isinstance(messages, Sequence):
        return False
    return any(isinstance(message, Mapping) and bool(message.get("tool_calls")) for message in messages)


def _with_content(message: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**message, "content": ""} if message.get("content") is None else message
