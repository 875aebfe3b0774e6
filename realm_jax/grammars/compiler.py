"""Compiled grammars of one vocabulary, the last used ones kept."""

import contextlib
import json
import queue
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.grammars import trial
from realm_jax.grammars.matcher import Matcher
from realm_jax.structured import StructuredOutput
from realm_jax.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

KEPT = 64
"""So many grammars are kept, and what was refused with its reason."""

SECONDS = 5.0
"""A grammar that takes longer to compile is refused; usual ones take a few milliseconds."""

START_SECONDS = 120.0
"""The process that tries grammars is given up if it takes so long to start."""


@dataclass(frozen=True)
class Grammar:
    """A grammar, and where its texts begin."""

    start: "llguidance.LLMatcher"
    words: int  # of a mask of llguidance's
    known: np.ndarray  # a bit for each token that the model has
    ends: np.ndarray  # and for each that ends a text

    def matcher(self) -> Matcher:
        """A new way through it."""
        return Matcher(self.start, self.words, self.known, self.ends)


class Grammars:
    """Turns what requests ask for into grammars over a model's tokens. Several threads may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        """vocab: tokens of the model, which may be more or fewer than its tokenizer knows."""
        self._tokenizer, self._vocab = tokenizer, vocab
        self._known: OrderedDict[tuple[str, str], Grammar | RequestError] = OrderedDict()
        self._lock = threading.Lock()
        self._words: trial.Words | None = None
        self._trial: _Trial | None = None

    def compile(self, asked: StructuredOutput) -> Grammar:
        """The grammar. Raises RequestError naming the field and the reason, if nothing can be made of it.

        Raises UnsupportedError where llguidance is not installed.
        """
        key = asked.kind, asked.text
        with self._lock:
            if key not in self._known:
                self._known[key] = self._compile(*key)
                if len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            found = self._known[key]
        if isinstance(found, RequestError):
            raise RequestError(str(found))
        return found

    def close(self) -> None:
        """The process that tries grammars has ended; the next grammar starts another."""
        with self._lock:
            if self._trial is not None:
                self._trial.end()
            self._trial = None

    def _compile(self, kind: str, text: str) -> Grammar | RequestError:
        words = self._vocabulary()
        answer = self._try(kind, text)
        if "grammar" not in answer:
            return RequestError(f"{kind} cannot be used: {_one_line(answer['error'])}")
        start = trial.in_deep_thread(lambda: words.compile(answer["grammar"]))
        if start.is_error():
            return RequestError(f"{kind} cannot be used: {_one_line(start.get_error())}")
        known, ends = self._bits(range(self._vocab)), self._bits(self._tokenizer.eog_ids)
        grammar = Grammar(start, -(-words.tokenizer.vocab_size // 32), known, ends)
        if not grammar.matcher().allowed.any():
            return RequestError(f"{kind} cannot be used: no token of this model's begins a text that matches")
        return grammar

    def _try(self, kind: str, text: str) -> dict[str, str]:
        """What the other process says of it."""
        try:
            if self._trial is None:
                self._trial = _Trial()
                weakref.finalize(self, self._trial.end)
                self._trial.learn(self._spelled())
            return self._trial.ask({"kind": kind, "text": text})
        except _Ended as error:
            if self._trial is not None:
                self._trial.end()
            self._trial = None
            return {"error": str(error)}

    def _vocabulary(self) -> trial.Words:
        if self._words is None:
            try:
                import llguidance
            except ImportError:
                raise UnsupportedError(
                    "structured output needs the package llguidance: pip install 'realm-jax[grammar]'"
                ) from None
            del llguidance
            encode = self._tokenizer.encode
            self._words = trial.Words(
                **self._facts(), encode=lambda text: encode(text, add_special=False, continues=True)
            )
        return self._words

    def _facts(self) -> dict[str, Any]:
        ids, known = range(self._tokenizer.vocab_size), self._tokenizer
        return {
            "tokens": [known.token_bytes(i) for i in ids],
            "special": [i for i in ids if known.is_special(i)],
            "ends": sorted(known.eog_ids),
        }

    def _spelled(self) -> str:
        facts = self._facts()
        return json.dumps({**facts, "tokens": [token.hex() for token in facts["tokens"]]})

    def _bits(self, tokens: Iterable[int]) -> np.ndarray:
        """A mask of these tokens, of those that the model has."""
        bits = np.zeros(32 * -(-self._vocab // 32), np.uint8)
        bits[[token for token in tokens if token < self._vocab]] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)


class _Ended(Exception):
    """The process that tries grammars did not answer."""


class _Trial:
    """The process that runs `trial.py`, and the thread that reads what it says."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(trial.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def learn(self, vocabulary: str) -> None:
        """It knows the vocabulary. Raises _Ended if it does not start in time."""
        self._said(vocabulary, START_SECONDS)

    def ask(self, question: dict[str, str]) -> dict[str, str]:
        """The answer. Raises _Ended if none comes in time."""
        return json.loads(self._said(json.dumps(question), SECONDS))

    def end(self) -> None:
        """The process is gone, however often this is asked."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was never read
                    pipe.close()

    def _said(self, line: str, seconds: float) -> str:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answer = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise _Ended(f"it took more than {seconds:g} seconds to compile; make it simpler") from None
        except OSError:
            answer = ""
        if not answer:
            raise _Ended("compiling it took more memory or stack than a grammar may have; make it simpler")
        return answer

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


def _one_line(reason: str) -> str:
    text = " ".join(reason.split())
    return text if len(text) <= 300 else text[:300] + " ..."
