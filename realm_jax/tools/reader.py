"""An answer as it comes, to text and calls. Any division of it into pieces gives the same."""

import json
import re
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from realm_jax.tools.formats import CallFormat


@dataclass(frozen=True)
class Content:
    """Text that is no call."""

    text: str


@dataclass(frozen=True)
class Opening:
    """A call begins."""

    name: str


@dataclass(frozen=True)
class Arguments:
    """The next part of the call's arguments, JSON."""

    text: str


Piece = Content | Opening | Arguments


@dataclass(frozen=True)
class ToolCall:
    """A function to call; arguments: a JSON object, as text."""

    name: str
    arguments: str


SKIPPED = re.compile(r"[\s\[\],;]*")
"""What may stand between objects: of a list, or a separator that a model chose."""


class CallReader:
    """Tells calls from text: the mutable record of one answer.

    constrained: a grammar keeps the calls, so that arguments are passed on as they come; without, a call is
    one when it is whole, its name known, and its arguments an object; everything else stays text. Space
    beside calls is no text.
    """

    def __init__(
        self, format: CallFormat, names: Container[str], *, constrained: bool, several: bool = True
    ) -> None:
        """several: whether what follows a call may be another, where no grammar says so."""
        self._format, self._names, self._several = format, names, several
        self._head = None
        if constrained:
            self._head = re.compile(
                rf'\{{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"{format.arguments}"\s*:\s*(?=\{{)'
            )
        self._state: Callable[[], bool] = self._start if format.opens is None else self._text
        self._out: list[Piece] = []
        self._rest = ""  # what has not been understood yet
        self._raw = ""  # since the calls were opened, in case they are none
        self._space = ""  # at the end of the text
        self._brackets = _Brackets()
        self._is_ending = False
        self._has_read = False  # a call, since the calls were opened
        self._beside_call = False
        self.calls = 0
        self.is_cut = False  # within a call's arguments

    @property
    def has_calls(self) -> bool:
        """Whether there are calls, all of them whole."""
        return self.calls > 0 and not self.is_cut

    def push(self, text: str) -> list[Piece]:
        """What the text adds."""
        self._rest += text
        while self._state():
            pass
        return self._taken()

    def finish(self) -> list[Piece]:
        """What was held back, when no text follows."""
        self._is_ending = True
        while self._state():
            pass
        self.is_cut = self._state == self._arguments
        if self._state not in (self._arguments, self._tail):
            self._content(self._left())
            if self.calls == 0 and self._space:
                self._out.append(Content(self._space))
        return self._taken()

    def _left(self) -> str:
        """What turned out to be text, when no more follows."""
        if self._has_read and self._state == self._opened:  # within what closes the calls
            return ""
        is_open = self._state in (self._object, self._opened)
        return self._raw + self._rest if is_open and not self._has_read else self._rest

    def _taken(self) -> list[Piece]:
        found, self._out = self._out, []
        return found

    # states: each uses up some of `_rest` and says whether there is more to do

    def _start(self) -> bool:
        """Nothing but space so far, and calls have no marker."""
        text = self._rest.lstrip()
        if not text:
            return False
        if text[0] in "{[":
            return self._open(self._rest[: -len(text)], text)
        self._state = self._plain
        return True

    def _plain(self) -> bool:
        self._content(self._rest)
        self._rest = ""
        return False

    def _text(self) -> bool:
        opens = self._format.opens or ""
        at = self._rest.find(opens)
        if at < 0:
            end = len(self._rest) - (0 if self._is_ending else _overlap(self._rest, opens))
            self._content(self._rest[:end])
            self._rest = self._rest[end:]
            return False
        self._content(self._rest[:at])
        return self._open(opens, self._rest[at + len(opens) :])

    def _open(self, raw: str, rest: str) -> bool:
        self._raw, self._rest, self._has_read, self._state = raw, rest, False, self._opened
        return True

    def _opened(self) -> bool:
        """Before an object, or behind the last."""
        if self._has_read and self._format.opens is None and not self._several:
            self._state = self._plain
            return True
        skipped = SKIPPED.match(self._rest)
        assert skipped is not None
        rest = self._rest[skipped.end() :]
        self._raw += skipped.group()
        self._rest = rest
        closes, opens = self._format.closes, self._format.opens
        if not rest or any(each and _begins(rest, each) for each in (closes, opens)):
            return False
        if rest[0] == "{":
            self._brackets, self._state = _Brackets(), self._object
            return True
        if not self._has_read:
            self._content(self._raw)
        elif closes and rest.startswith(closes):
            self._rest = rest[len(closes) :]
        self._state = self._text if opens is not None else self._plain
        return True

    def _object(self) -> bool:
        if self._head is not None and (head := self._head.match(self._rest)) and head[1] in self._names:
            self._begin_call(head[1])
            self._rest = self._rest[head.end() :]
            self._brackets, self._state = _Brackets(depth=1), self._arguments
            return True
        end = self._brackets.end(self._rest)
        if end is None:
            return False
        text, self._rest = self._rest[:end], self._rest[end:]
        call = _call(text, self._names)
        if call is None:
            self._content((self._raw if not self._has_read else "") + text)
            self._state = self._text if self._format.opens is not None else self._plain
            return True
        self._begin_call(call.name)
        self._out.append(Arguments(call.arguments))
        self._state = self._opened
        return True

    def _arguments(self) -> bool:
        """Within the arguments, of which nothing is held back."""
        end = self._brackets.end(self._rest, depth=1)
        text = self._rest[:end]
        if text:
            self._out.append(Arguments(text))
        self._rest = self._rest[len(text) :]
        self._brackets.forget(len(text))
        if end is None:
            return False
        self._state = self._tail
        return True

    def _tail(self) -> bool:
        """Behind the arguments, within their object."""
        end = self._brackets.end(self._rest)
        size = len(self._rest) if end is None else end
        self._rest = self._rest[size:]
        self._brackets.forget(size)
        if end is None:
            return False
        self._state = self._opened
        return True

    def _begin_call(self, name: str) -> None:
        self._out.append(Opening(name))
        self.calls += 1
        self._has_read, self._beside_call, self._space, self._raw = True, True, "", ""

    def _content(self, text: str) -> None:
        """The text stands; space at its end waits for what follows."""
        text = self._space + text
        if self._beside_call:
            text = text.lstrip()
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._beside_call = False
            self._out.append(Content(shown))


@dataclass
class _Brackets:
    """How deep in JSON's brackets a text that grows has come."""

    depth: int = 0
    _at: int = 0
    _in_string: bool = False
    _marks: dict[bool, re.Pattern[str]] = field(
        default_factory=lambda: {True: re.compile(r'["\\]'), False: re.compile(r'["{}\[\]]')}
    )

    def end(self, text: str, depth: int = 0) -> int | None:
        """Where the text is back at this depth; None as long as it is not. It must have grown at its end."""
        while mark := self._marks[self._in_string].search(text, self._at):
            self._at = mark.end()
            match mark[0]:
                case '"':
                    self._in_string = not self._in_string
                case "\\":
                    self._at += 1  # beyond the end, if what is escaped has not come yet
                case "{" | "[":
                    self.depth += 1
                case _:
                    self.depth -= 1
                    if self.depth <= depth:
                        return self._at
        self._at = max(self._at, len(text))
        return None

    def forget(self, size: int) -> None:
        """The text is without so many characters of its beginning, which have been seen."""
        self._at -= size


def _overlap(text: str, marker: str) -> int:
    """How many characters at the end of the text may become the marker."""
    sizes = range(min(len(marker) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)


def _begins(text: str, marker: str) -> bool:
    """Whether the text may become the marker."""
    return len(text) < len(marker) and marker.startswith(text)


def _call(text: str, names: Container[str]) -> ToolCall | None:
    """The call that a JSON object is; None if it is none."""
    try:
        value: Any = json.loads(text)
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
    except (ValueError, AttributeError, RecursionError):
        return None
    name = value.get("name")
    if not isinstance(name, str) or name not in names or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def read_answer(reader: CallReader, text: str) -> tuple[str | None, list[ToolCall]]:
    """The text of a whole answer, None if there is none beside calls, and its calls."""
    content, calls = list[str](), list[tuple[str, list[str]]]()
    for piece in (*reader.push(text), *reader.finish()):
        match piece:
            case Content(part):
                content.append(part)
            case Opening(name):
                calls.append((name, []))
            case Arguments(part):
                calls[-1][1].append(part)
    said: Iterable[str] = content
    found = [ToolCall(name, "".join(parts)) for name, parts in calls]
    return "".join(said) or (None if found else ""), found
