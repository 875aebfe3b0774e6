"""A request's tools and the model that answers: the form of its answers, and how they are read."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from realm_jax.errors import RequestError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams
from realm_jax.serving.request import FinishReason, GenerationOutput, TextDelta
from realm_jax.structured import StructuredOutput
from realm_jax.tokenizer import Tokenizer
from realm_jax.tools import Arguments, CallFormat, CallReader, Content, Opening, Piece, Toolset, quoted


@dataclass(frozen=True)
class Calling:
    """How a model calls these tools. form: what answers must be like; None where nothing keeps them."""

    tools: Toolset
    format: CallFormat
    form: StructuredOutput | None

    @classmethod
    def of(cls, tools: Toolset, llm: LLM) -> "Calling":
        """The way of the model. Raises UnsupportedError if it has none, RequestError for hostile schemas."""
        format = llm.model.require_tools().format
        grammar = format.grammar(tools, _spelling(llm.tokenizer))
        if grammar is None:
            return cls(tools, format, None)
        form = StructuredOutput(grammar=grammar)
        try:
            llm.engine.grammars.compile(form)
        except RequestError as error:
            raise RequestError(f"tools: the {error}") from None
        return cls(tools, format, form)

    def params(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the form, and a text that shows the tokens that calls begin with."""
        if self.form is None:
            return params
        return replace(params, structured_output=self.form, skip_special_tokens=False)

    def answer(self, output: GenerationOutput) -> tuple[dict[str, Any], str]:
        """The message of a whole answer, but for its role, and why it ended, as OpenAI says it."""
        stream = self.stream(output.request_id, output.sample_index)
        stream.read(output.text, is_last=True)
        said = {"content": None} | stream.said
        for call in said.get("tool_calls", ()):
            del call["index"]
        return said, stream.reason(output)

    def stream(self, request_id: str, sample: int) -> "CallStream":
        """What reads one answer."""
        names, several = self.tools.names, self.tools.several
        reader = CallReader(self.format, names, constrained=self.form is not None, several=several)
        return CallStream(reader, lambda i: self._call_id(f"{request_id}-{sample}-{i}"))

    def _call_id(self, place: str) -> str:
        """The same wherever the answer is shown, whole or streamed."""
        return self.format.call_id(hashlib.sha256(place.encode("utf-8", "surrogatepass")).hexdigest())


class CallStream:
    """One answer as OpenAI's deltas: the mutable record.

    said: what the last piece of text added, `content` and `tool_calls`.
    """

    def __init__(self, reader: CallReader, call_id: Callable[[int], str]) -> None:
        self._reader, self._call_id = reader, call_id
        self._calls = 0
        self.said: dict[str, Any] = {}

    def push(self, delta: TextDelta) -> bool:
        """`said` is what the delta adds; whether that is anything."""
        self.read(delta.text, is_last=delta.output is not None)
        return bool(self.said)

    def read(self, text: str, *, is_last: bool) -> None:
        pieces = self._reader.push(text)
        self.said = self._shown([*pieces, *self._reader.finish()] if is_last else pieces)

    def reason(self, output: GenerationOutput) -> str:
        """Why the answer ended: in calls, if it stopped by itself and all of them are whole."""
        ends_in_calls = output.finish_reason is FinishReason.STOP and self._reader.has_calls
        return "tool_calls" if ends_in_calls else str(output.finish_reason)

    def _shown(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content, calls = list[str](), list[dict[str, Any]]()
        for piece in pieces:
            match piece:
                case Content(text):
                    content.append(text)
                case Opening(name):
                    head = {"index": self._calls, "id": self._call_id(self._calls), "type": "function"}
                    calls.append(head | {"function": {"name": name, "arguments": ""}})
                    self._calls += 1
                case Arguments(text):
                    if not calls:
                        calls.append({"index": self._calls - 1, "function": {"arguments": ""}})
                    calls[-1]["function"]["arguments"] += text
        said: dict[str, Any] = {"content": "".join(content)} if content else {}
        return said | ({"tool_calls": calls} if calls else {})


def _spelling(tokenizer: Tokenizer) -> Callable[[str], str]:
    """How a grammar names a marker: by its id where it is one control token, which no text can spell."""

    def spelled(marker: str) -> str:
        token = tokenizer.token_to_id(marker)
        if token is None or not tokenizer.is_special(token):
            return quoted(marker)
        return f"<[{token}]>"

    return spelled
