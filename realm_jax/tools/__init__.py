"""Tools: functions that a model may call, how its template's family writes calls, and how they are read."""

from realm_jax.tools.definitions import Toolset, read_tools
from realm_jax.tools.formats import FORMATS, CallFormat, quoted
from realm_jax.tools.reader import Arguments, CallReader, Content, Opening, Piece, ToolCall, read_answer
from realm_jax.tools.support import ToolUse, find_tool_use, has_calls

__all__ = [
    "FORMATS",
    "Arguments",
    "CallFormat",
    "CallReader",
    "Content",
    "Opening",
    "Piece",
    "ToolCall",
    "ToolUse",
    "Toolset",
    "find_tool_use",
    "has_calls",
    "quoted",
    "read_answer",
    "read_tools",
]
