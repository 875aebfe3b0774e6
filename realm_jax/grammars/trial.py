"""A process that compiles grammars before the engine's own does: what a hostile one takes, it takes here.

Run as a program: the first line of stdin is the vocabulary, each further one a grammar; one line each comes
back. llguidance limits most of what a grammar may cost, but not all: a conjunction of thirty expressions can
take hours, a chain of a few thousand rules the whole stack. Whoever started this process ends it then.
Imports nothing of realm_jax, so that it starts at once.
"""

import json
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import llguidance

LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 20_000,  # 1 to 2 kB each
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
"""What one grammar may take of llguidance: about 50 ms to begin, 15 ms a token, 40 MB."""

STACK = 256 << 20
"""Bytes, of addresses only: a chain of rules that refer to the next, in 64 KiB of text, takes up to 60 MB."""

MEMORY = 2 << 30
"""Bytes that this process may have."""

PROBED = 64
"""Tokens that a grammar is tried with: their masks, too, are computed here first."""

WHITESPACE = r"[ \n\r\t]{1,20}"
"""What may stand where JSON allows space: some models would otherwise never say anything else again."""


class Words:
    """A vocabulary, as llguidance takes it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self,
        tokens: Sequence[bytes],
        special: Sequence[int],
        ends: Sequence[int],
        encode: "Callable[[str], list[int]] | None" = None,
    ) -> None:
        self.tokens, self.special_token_ids = tokens, special
        self.eos_token_id = min(ends, default=None)
        self._encode = encode
        import llguidance

        self.tokenizer = llguidance.LLTokenizer(self, eos_token=sorted(ends) or None)  # pyright: ignore[reportArgumentType]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that is the only one possible: of exactly its bytes."""
        if self._encode is not None:
            ids = self._encode(text)
            if b"".join(self.tokens[i] for i in ids) == text.encode():
                return ids
        return self.tokenizer.greedy_tokenize(text)

    def compile(self, grammar: str) -> "llguidance.LLMatcher":
        """The grammar's matcher, before the first token; whether it is one, `is_error` says."""
        import llguidance

        limits = llguidance.LLParserLimits(**LIMITS)
        return llguidance.LLMatcher(self.tokenizer, grammar, limits=limits, log_level=0)


def in_deep_thread(work: Callable[[], Any]) -> Any:
    """What `work` returns, run where grammars may nest deeply. Raises what it raises."""
    result: list[Any] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as raised:
            error.append(raised)

    with _stack_size:
        before = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if error:
        raise error[0]
    return result[0]


_stack_size = threading.Lock()


def _grammar_of(kind: str, text: str) -> str:
    """As llguidance names it. Raises ValueError for what cannot be converted."""
    import llguidance

    if kind in ("json_schema", "json_object"):
        defaults: Any = {"whitespace_pattern": WHITESPACE}
        schema = {"allOf": [json.loads(text)]} if text in ("true", "false") else text
        return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=defaults)
    if kind == "choice":
        choices = (json.dumps(each, ensure_ascii=False) for each in json.loads(text))
        return llguidance.LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
    return llguidance.grammar_from(kind, text)  # pyright: ignore[reportArgumentType]: regex or grammar


def _answer(words: Words, kind: str, text: str) -> dict[str, str]:
    """The grammar, or why it is none."""
    import numpy as np

    try:
        grammar = _grammar_of(kind, text)
    except (ValueError, RecursionError) as error:
        return {"error": str(error)}
    matcher = words.compile(grammar)
    mask = np.zeros(-(-words.tokenizer.vocab_size // 32), np.uint32)
    draw = np.random.default_rng(0)
    for i in range(PROBED):
        if not matcher.is_error() and not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        if i == 0 and (matcher.is_error() or not len(ids)):
            reason = matcher.get_error().removesuffix("<non-verbose/>").strip()
            return {"error": "nothing matches it" if reason in ("", "NoExtensionBias") else reason}
        if matcher.is_stopped() or not len(ids) or not matcher.consume_token(int(draw.choice(ids))):
            break
    return {"grammar": grammar}


def _serve() -> None:
    first = json.loads(sys.stdin.readline())
    tokens = [bytes.fromhex(each) for each in first["tokens"]]
    words = Words(tokens, first["special"], first["ends"])
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(_answer(words, asked["kind"], asked["text"])), flush=True)


if __name__ == "__main__":
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except ImportError:
        pass  # Windows
    in_deep_thread(_serve)
