"""JSONL files -> examples: token ids, and which of them are learned.

A line is {"messages": [...]}, rendered by the model's chat template, of which what the assistant says is
learned, or {"prompt": text, "completion": text}, of which the completion is; each with its end token.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.chat import ChatTemplate
from realm_jax.errors import ModelFileError, RequestError
from realm_jax.tokenizer import Tokenizer

MAX_LINE = 16 << 20
"""Bytes of a line: far more than any context holds."""
FORMS = '{"messages": [...]} or {"prompt": text, "completion": text}'
FIELDS = ({"messages"}, {"prompt", "completion"})


@dataclass(frozen=True, eq=False)
class Example:
    """A sequence and the tokens of it that are learned, never the first."""

    ids: np.ndarray  # int32 [T]
    is_target: np.ndarray  # bool [T]


@dataclass(frozen=True, eq=False)
class Reader:
    """How texts become examples: what serving the same model does with them.

    drops_long: sequences of more than `context` tokens are left out, rather than an error.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    context: int
    drops_long: bool = False

    def read(self, path: Path) -> tuple[list[Example], int]:
        """The examples of a file, and how many of its lines were left out as too long.

        Raises RequestError that names the first line that is no example, and if there are none at all.
        """
        examples, dropped = [], 0
        for number, line in _lines(path):
            try:
                example = self.example(_parsed(line))
                if (length := len(example.ids)) > self.context:
                    if not self.drops_long:
                        raise RequestError(
                            f"{length:,} tokens; the context is {self.context:,} (raise --ctx-size, or "
                            "--drop-long leaves such lines out)"
                        )
                    dropped += 1
                    continue
            except (RequestError, ModelFileError) as error:
                raise type(error)(f"{path.name}, line {number:,}: {error}") from error
            examples.append(example)
        if not examples:
            raise RequestError(
                f"{path.name} has no examples" + (f": {dropped:,} too long" if dropped else "")
            )
        return examples, dropped

    def example(self, line: dict[str, Any]) -> Example:
        """The example that a line means."""
        if "messages" in line:
            return self._conversation(line["messages"])
        prompt, completion = line["prompt"], line["completion"]
        for name, text in (("prompt", prompt), ("completion", completion)):
            if not isinstance(text, str):
                raise RequestError(f"{name} is {str(text)[:60]!r}; it must be a text")
        before = self.tokenizer.encode(prompt, add_special=True, parse_special=True)
        ids = self.tokenizer.encode(prompt + completion, add_special=True, parse_special=True)
        return self._example(ids, [(_shared(before, ids), len(ids))])

    def _conversation(self, messages: Any) -> Example:
        if self.template is None:
            raise RequestError(
                'messages need a chat template, which the model lacks; use {"prompt", "completion"}'
            )
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise RequestError("messages must be a list of objects")
        if messages and messages[0].get("role") == "assistant":
            raise RequestError("messages[0] is the assistant's: there is nothing that it answers")
        ids = self._rendered(messages, is_open=False)
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                before = self._rendered(messages[:i], is_open=True)
                after = ids if i + 1 == len(messages) else self._rendered(messages[: i + 1], is_open=False)
                start, end = _shared(before, ids), _shared(after, ids)
                # a token may span both turns, no more
                if start + 1 < len(before) or end + 1 < len(after):
                    raise RequestError(
                        f"messages[{i}]: the chat template shows a turn otherwise once others follow; give "
                        "each answer a line of its own, at the end"
                    )
                spans.append((start, end))
        if not spans:
            raise RequestError("messages have no turn of the role 'assistant': nothing would be learned")
        return self._example(ids, spans)

    def _rendered(self, messages: Sequence[dict[str, Any]], *, is_open: bool) -> list[int]:
        """A conversation's tokens, as `LLM.chat_prompt` makes them; is_open: the model is to answer."""
        assert self.template is not None
        text = self.template.render(messages, add_generation_prompt=is_open)
        ids, bos = self.tokenizer.encode(text, add_special=False, parse_special=True), self.tokenizer.bos_id
        return [bos, *ids] if self.tokenizer.add_bos and bos is not None and ids[:1] != [bos] else ids

    def _example(self, ids: list[int], spans: list[tuple[int, int]]) -> Example:
        """Spans end with their end token; the last gets one where nothing in it ends it."""
        ends = self.tokenizer.eog_ids
        is_target = np.zeros(len(ids) + 1, bool)
        for start, end in spans:
            last = next((at for at in reversed(range(start, end)) if ids[at] in ends), end)
            is_target[start : last + (last < end)] = True
        start, end = spans[-1]
        if end == len(ids) and not ends & set(ids[start:end]) and (eos := self.tokenizer.eos_id) is not None:
            ids, is_target[end] = [*ids, eos], True
        is_target[0] = False
        example = Example(np.array(ids, np.int32), is_target[: len(ids)])
        if not example.is_target.any():
            raise RequestError("nothing would be learned: there is no token after the first")
        return example


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise RequestError(
                        f"{path.name}, line {number:,}: more than {MAX_LINE:,} bytes, the limit of a line"
                    )
                if line.strip():
                    yield number, line
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error


def _parsed(line: bytes) -> dict[str, Any]:
    """The object of a line, of one of the two forms."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"no UTF-8: {error.reason} at byte {error.start + 1:,}") from error
    except (ValueError, RecursionError) as error:  # also numbers of too many digits
        raise RequestError(f"no JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"no object; a line is {FORMS}")
    if (fields := set(value) - {"id"}) not in FIELDS:
        found = ", ".join(sorted(ascii(field)[1:-1][:60] for field in list(fields)[:20]))
        raise RequestError(f"fields are {found or 'none'}; a line is {FORMS}")
    return value


def _shared(before: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(before, ids, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(before), len(ids)))
