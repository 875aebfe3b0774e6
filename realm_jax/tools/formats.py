"""How families of models write calls, as data: what stands around them, and the grammar of that."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from realm_jax.tools.definitions import Function, Toolset

WHITESPACE = r"[ \n\r\t]{1,20}"
"""What may stand where JSON allows space, as in all structured output."""


@dataclass(frozen=True)
class CallFormat:
    """Calls as JSON objects `{"name": "...", ARGUMENTS: {...}}` in a row, with texts around them.

    opens: what tells calls from text; None where an answer that begins with an object or a list is one.
    before, after, between, last: before the first object, after each, between two, after all of them.
    between is None where one answer has one call. closes: what a reader takes as the end.
    """

    name: str
    opens: str | None
    before: str = ""
    after: str = ""
    between: str | None = None
    last: str = ""
    closes: str | None = None
    arguments: str = "arguments"
    id_prefix: str = "call_"
    id_length: int = 24

    def call_id(self, digest: str) -> str:
        """An id of the form that this family's templates take, of a digest in hexadecimal."""
        return self.id_prefix + digest[: self.id_length]

    def grammar(self, tools: Toolset, spelled: Callable[[str], str]) -> str | None:
        """The answers that may be given, in Lark; None where the tools leave the answer free.

        Where the model decides, any text may come first, and what follows `opens` is a call. spelled: a text
        as Lark has it, which may be one special token.
        """
        if tools.forced is None and self.opens is None:
            return None
        more = "" if self.between is None or not tools.several else f" ({quoted(self.between)} one)*"
        calls = " ".join(filter(None, (quoted(self.before), "one" + more, quoted(self.last))))
        lines = ["%llguidance {}"]
        if self.opens is None:
            lines.append(f"start: {calls}")
        elif tools.forced is not None:
            lines.append(f"start: {spelled(self.opens)} {calls}")
        else:
            opens = spelled(self.opens)
            lazy = "[lazy]" if opens.startswith('"') else ""  # it ends where the marker first stands
            lines += [f"start: TEXT | opened {calls}", f"opened{lazy}: TEXT {opens}", r"TEXT: /(.|\n)*/"]
        choices = " | ".join(f"call_{i}" for i in range(len(tools.callable)))
        lines.append(f"one: ({choices}) {quoted(self.after)}")
        lines += [f"call_{i}: {self._call(function)}" for i, function in enumerate(tools.callable)]
        return "\n".join(lines) + "\n"

    def _call(self, function: Function) -> str:
        head = f'{{"name": {json.dumps(function.name)}, "{self.arguments}": '
        schema = {**function.parameters, "x-guidance": {"whitespace_pattern": WHITESPACE}}
        return f"{quoted(head)} %json {json.dumps(schema)} {quoted('}')}"


def quoted(text: str) -> str:
    """The text in Lark; nothing for an empty one."""
    return json.dumps(text) if text else ""


def _listed(name: str, opens: str, closes: str | None = None) -> CallFormat:
    """Calls in a JSON list."""
    return CallFormat(name, opens, "[", between=", ", last="]" + (closes or ""), closes=closes)


HERMES = CallFormat(
    "hermes",
    "<tool_call>",
    before="\n",
    after="\n</tool_call>",
    between="\n<tool_call>\n",
    closes="</tool_call>",
)
FORMATS = (
    HERMES,  # Qwen 2.5 and 3, Hermes, Granite 4
    replace(_listed("mistral", "[TOOL_CALLS]"), id_prefix="", id_length=9),  # its templates refuse others
    _listed("apriel", "<tool_calls>", "</tool_calls>"),
    _listed("nemotron", "<TOOLCALL>", "</TOOLCALL>"),
    CallFormat("llama", None, arguments="parameters"),  # 3.x
    CallFormat("generic", None),
)
"""Which of them is a model's, its template says: `find_tool_use`."""
