"""Text as it comes: deltas that never split a character and never show part of a stop string."""

import codecs
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.tokenizer.tokenizer import Tokenizer

_LOOSE = re.compile(r" (?=[?!.,])")
_QUOTED = re.compile(r" ' ")
_CONTRACTED = re.compile(r" (?='(?:[sm]|re|ve))")


def clean_spaces(text: str) -> str:
    """The text without the spaces that tokens leave before punctuation and English contractions."""
    return _CONTRACTED.sub("", _QUOTED.sub("'", _LOOSE.sub("", text)))


class TextStream:
    """The text of token ids that arrive one by one.

    The deltas joined, with `finish`, are `tokenizer.decode` of all ids, cut where a stop string begins: of
    several, the one that ends first, and the longest of those. A push costs the same however long the text.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        stop: Sequence[str] = (),
        skip_special: bool = True,
        *,
        continues: bool = False,
        verbatim: bool = False,
    ) -> None:
        """`continues`: the ids go on behind a prompt, so that a first space is part of the text.

        `verbatim`: no space is removed, whatever decoding would do.
        """
        if "" in stop:
            raise RequestError("stop has an empty string; leave it out to stop at end tokens only")
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip_special = skip_special
        self._first = not continues
        self._cleans = tokenizer.clean_spaces and not verbatim
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._unsettled: list[str] = []
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All deltas so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def push(self, token_id: int) -> str:
        """The text that this token makes safe to show; "" once a stop string was met."""
        if self.stopped is not None:
            return ""
        piece = self._tokenizer.piece(token_id, self._skip_special, self._first)
        self._first = False
        return self._show(self._clean(self._characters.decode(piece)), last=False)

    def finish(self) -> str:
        """The text held back so far, when no token follows."""
        if self.stopped is not None:
            return ""
        rest = self._clean(self._characters.decode(b"", True)) + clean_spaces("".join(self._unsettled))
        self._unsettled = []
        return self._show(rest, last=True)

    def _clean(self, new: str) -> str:
        """The settled part of the text, cleaned. The rest waits: what follows decides on its spaces."""
        if not self._cleans:
            return new
        context = self._unsettled[-1][-1] if self._unsettled else ""
        end = _settled(context + new) - len(context)
        if end <= 0:
            self._unsettled += [new] if new else []
            return ""
        settled = clean_spaces("".join(self._unsettled) + new[:end])
        self._unsettled = [new[end:]] if new[end:] else []
        return settled

    def _show(self, new: str, last: bool) -> str:
        text = self._held + new
        met = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if met:
            _, end, self.stopped = min(met)
        else:
            end = len(text) if last else len(text) - self._stop_prefix(text)
        self._held = text[end:] if self.stopped is None else ""
        if end:
            self._shown.append(text[:end])
        return text[:end]

    def _stop_prefix(self, text: str) -> int:
        """How many characters at the end of the text may still become a stop string."""
        longest = max(map(len, self._stop), default=0)
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(text[start] == stop[0] and stop.startswith(text[start:]) for stop in self._stop):
                return len(text) - start
        return 0


def _settled(text: str) -> int:
    """How many characters can be cleaned apart from what follows: no pattern goes on behind them."""
    end = len(text)
    while end and (
        text[end - 1] in " '" or (text[end - 1] in "rv" and text[end - 2 : end - 1] in ("'", " "))
    ):
        end -= 1
    return end
