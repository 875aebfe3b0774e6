"""llama.cpp's side of bench_cpu: a worker, or with arguments one answer as a process of its own.

Runs in any interpreter that has llama_cpp and numpy; imports nothing of this project but files beside it.
"""

import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

from bench_workers import serve
from llama_peer import LlamaPeer

CONTEXT = 4096  # what `realm generate` has unless told otherwise


class Theirs:
    """One model in llama.cpp."""

    def __init__(self) -> None:
        self._peer: LlamaPeer | None = None
        self._first: list[int] = []  # of the sequences that `fill` made
        self._depth = 0

    def facts(self) -> dict[str, str]:
        """Versions."""
        return {"llama_cpp_python": _package().__version__, "python": platform.python_version()}

    def quantize(self, source: str, target: str, file_type: int) -> None:
        """The source's numbers in another of llama.cpp's file types, by its own quantizer."""
        api: Any = importlib.import_module("llama_cpp.llama_cpp")
        log = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(log, None)
        params = api.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = file_type, True
        partial = f"{target}.{os.getpid()}.part"
        if code := api.llama_model_quantize(source.encode(), partial.encode(), params):
            raise SystemExit(f"llama_model_quantize failed with {code} on {source}")
        Path(partial).rename(target)

    def load(self, path: str, threads: int, unified: bool) -> float:
        """Seconds until the file's weights were there; the model before is gone."""
        if self._peer is not None:
            self._peer.close()
            self._peer = None
        self._peer = LlamaPeer(Path(path), sequences=1, tokens=1, threads=threads, unified=unified)
        return self._peer.load_seconds

    def open(self, sequences: int, tokens: int) -> dict[str, Any]:
        """There is room for so many sequences of so many tokens; returns the flags."""
        self._model.reopen(sequences=sequences, tokens=tokens)
        return self._model.flags

    def logits(self, prompt: list[int]) -> list[float]:
        return self._model.logits(prompt).tolist()

    def prefill(self, prompt: list[int]) -> float:
        """Seconds to the token that follows the prompt."""
        self._model.clear()
        start = time.perf_counter()
        self._model.prefill([prompt])
        return time.perf_counter() - start

    def fill(self, prompts: list[list[int]], common: int) -> None:
        """The prompts, whose first `common` tokens are the same, are in the cache."""
        self._model.clear()
        if common:
            self._model.prefill([prompts[0][:common]])
            self._model.share()
        self._first = self._model.prefill([prompt[common:] for prompt in prompts], common)
        self._depth = len(prompts[0])

    def decode(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        """Every sequence of `fill` gets so many tokens more; the next call starts at the same depth."""
        self._model.rewind(self._depth)
        start = time.perf_counter()
        self._model.generate(self._first, self._depth, tokens)
        return {"tokens": tokens * len(prompts), "seconds": time.perf_counter() - start}

    @property
    def _model(self) -> LlamaPeer:
        if self._peer is None:
            raise SystemExit("no model is loaded")
        return self._peer


def _package() -> Any:
    return importlib.import_module("llama_cpp")


def answer(path: str, prompt: str, tokens: int, threads: int) -> dict[str, int]:
    """A greedy answer to a chat prompt, as `realm generate` gives it."""
    llama = _package().Llama(path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
    said = llama.create_chat_completion(
        [{"role": "user", "content": prompt}], max_tokens=tokens, temperature=0.0
    )
    llama.close()
    return {"completion_tokens": said["usage"]["completion_tokens"]}


if __name__ == "__main__":
    if len(sys.argv) == 1:
        serve(Theirs())
    else:
        path, prompt, tokens, threads = sys.argv[1:]
        print(json.dumps(answer(path, prompt, int(tokens), int(threads))))
