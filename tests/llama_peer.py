"""llama.cpp through llama-cpp-python's low-level API, for comparisons: many sequences, greedy."""

import ctypes
import importlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

N_BATCH, N_UBATCH = 2048, 512  # llama-server's defaults
Pointer = ctypes.POINTER(ctypes.c_int32)


@dataclass(frozen=True)
class Job:
    """A prompt, and how many tokens to add to it."""

    prompt: list[int]
    tokens: int


@dataclass
class _Slot:
    """A sequence that runs: what it was given, and what came of it."""

    index: int
    job: Job
    fed: int = 0
    made: list[int] = field(default_factory=list)

    def take(self, room: int) -> list[int]:
        """The tokens to compute next: a part of the prompt, or the token made last."""
        prompt = self.job.prompt
        return self.made[-1:] if self.fed >= len(prompt) else prompt[self.fed : self.fed + room]


class LlamaPeer:
    """A context of llama.cpp with room for `sequences` of `tokens` tokens each."""

    def __init__(self, path: Path, *, sequences: int, tokens: int, threads: int, unified: bool) -> None:
        self._api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self._log = self._api.llama_log_callback(lambda level, text, data: None)
        self._api.llama_log_set(self._log, None)
        self._api.llama_backend_init()
        self._path, self._threads, self._unified = path, threads, unified
        start = time.perf_counter()
        self._model = self._api.llama_model_load_from_file(
            bytes(path), self._api.llama_model_default_params()
        )
        self.load_seconds = time.perf_counter() - start
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path}")
        self._vocab = self._api.llama_vocab_n_tokens(self._api.llama_model_get_vocab(self._model))
        self._open(sequences, tokens)

    def _open(self, sequences: int, tokens: int) -> None:
        params = self._api.llama_context_default_params()
        params.n_ctx = sequences * -(-tokens // 256) * 256
        params.n_seq_max = sequences
        params.n_batch, params.n_ubatch = N_BATCH, N_UBATCH
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = self._unified
        self._context = self._api.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(
                f"llama.cpp could not make a context of {params.n_ctx:,} tokens for {self._path}"
            )
        self._memory = self._api.llama_get_memory(self._context)
        self._sequence_count = sequences
        self.flags = {
            **{name: getattr(params, name) for name in ("n_threads", "n_threads_batch", "kv_unified")},
            **{name: getattr(params, name) for name in ("n_batch", "n_ubatch", "type_k", "type_v")},
            "flash_attn_type": params.flash_attn_type,  # -1: llama.cpp decides
            "system_info": self._api.llama_print_system_info().decode(),
        }
        self._make_batch()

    def close(self) -> None:
        """Its memory is free."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def reopen(self, *, sequences: int, tokens: int) -> None:
        """The context has room for so many others; what it held is gone, the model stays."""
        self._api.llama_free(self._context)
        self._open(sequences, tokens)

    def _make_batch(self) -> None:
        """One llama_batch over arrays of ours: filling it costs no loop in Python."""
        self._tokens, self._positions, self._sequences = np.zeros((3, N_BATCH), np.int32)
        self._wanted, self._ones = np.zeros(N_BATCH, np.int8), np.ones(N_BATCH, np.int32)
        start = self._sequences.ctypes.data
        self._rows = (Pointer * N_BATCH)(*(ctypes.cast(start + 4 * i, Pointer) for i in range(N_BATCH)))
        self._batch = self._api.llama_batch(
            n_tokens=0,
            token=self._tokens.ctypes.data_as(Pointer),
            embd=None,
            pos=self._positions.ctypes.data_as(Pointer),
            n_seq_id=self._ones.ctypes.data_as(Pointer),
            seq_id=ctypes.cast(self._rows, ctypes.POINTER(Pointer)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def _decode(self, parts: Sequence[tuple[int, int, Sequence[int], bool]]) -> list[int]:
        """parts: sequence, first position, tokens, and whether to say what follows the last of them."""
        at = 0
        for sequence, position, tokens, is_wanted in parts:
            end = at + len(tokens)
            self._tokens[at:end] = tokens
            self._positions[at:end] = np.arange(position, position + len(tokens))
            self._sequences[at:end] = sequence
            self._wanted[at:end] = 0
            self._wanted[end - 1] = is_wanted
            at = end
        self._batch.n_tokens = at
        if code := self._api.llama_decode(self._context, self._batch):
            raise SystemExit(f"llama_decode failed with {code} on {at} tokens")
        wanted = sum(is_wanted for *_, is_wanted in parts)
        if not wanted:
            self._api.llama_synchronize(self._context)
            return []
        logits = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (wanted, self._vocab))
        return logits.argmax(axis=1).tolist()

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """float32 [V]: the scores of the token that follows a prompt of at most N_BATCH tokens."""
        self._decode([(0, 0, prompt, True)])
        scores = np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (self._vocab,)).copy()
        self.clear()
        return scores

    def clear(self) -> None:
        """No sequence is in the cache."""
        self._api.llama_memory_clear(self._memory, False)

    def prefill(self, prompts: Sequence[Sequence[int]], start: int = 0) -> list[int]:
        """Each prompt is in the cache of its sequence, from position `start` on, in calls of full batches.

        Returns what follows each.
        """
        found: list[int] = []
        parts: list[tuple[int, int, Sequence[int], bool]] = []
        room = N_BATCH
        for sequence, prompt in enumerate(prompts):
            position = 0
            while position < len(prompt):
                tokens = prompt[position : position + room]
                is_last = position + len(tokens) == len(prompt)
                parts.append((sequence, start + position, tokens, is_last))
                position, room = position + len(tokens), room - len(tokens)
                if not room:
                    found, parts, room = found + self._decode(parts), [], N_BATCH
        return found + self._decode(parts) if parts else found

    def share(self) -> None:
        """Every sequence holds what the first one does."""
        for other in range(1, self._sequence_count):
            self._api.llama_memory_seq_cp(self._memory, 0, other, -1, -1)

    def rewind(self, position: int) -> None:
        """Every sequence holds its tokens before the position, and no others."""
        for sequence in range(self._sequence_count):
            if not self._api.llama_memory_seq_rm(self._memory, sequence, position, -1):
                raise SystemExit(f"llama.cpp could not rewind sequence {sequence} to {position}")

    def generate(self, last: Sequence[int], position: int, steps: int) -> list[int]:
        """Every sequence is `steps` tokens longer; `last` are its newest, at `position`."""
        tokens = list(last)
        for step in range(steps):
            tokens = self._decode([(i, position + step, [token], True) for i, token in enumerate(tokens)])
        return tokens

    def serve(self, jobs: Sequence[Job], parallel: int) -> list[list[int]]:
        """What each job made, `parallel` at once, batched continuously as llama-server does.

        Each call carries one token of every sequence that generates, then tokens of the prompts of those
        that were let in, as far as n_batch goes.
        """
        waiting, made = deque(enumerate(jobs)), [[] for _ in jobs]
        slots: list[_Slot | None] = [None] * parallel
        while waiting or any(slots):
            for i, slot in enumerate(slots):
                if slot is None and waiting:
                    slots[i] = _Slot(*waiting.popleft())
            running = [(i, slot) for i, slot in enumerate(slots) if slot is not None]
            running.sort(key=lambda each: not each[1].made)  # those that generate come first
            parts, room = [], N_BATCH
            for i, slot in running:
                if tokens := slot.take(room):
                    is_wanted = slot.fed + len(tokens) >= len(slot.job.prompt)
                    parts.append((i, slot.fed, tokens, is_wanted))
                    slot.fed, room = slot.fed + len(tokens), room - len(tokens)
            said = iter(self._decode(parts))
            for i, _, _, is_wanted in parts:
                slot = slots[i]
                if not is_wanted or slot is None:
                    continue
                slot.made.append(next(said))
                if len(slot.made) == slot.job.tokens:
                    made[slot.index], slots[i] = slot.made, None
                    self._api.llama_memory_seq_rm(self._memory, i, -1, -1)
        return made
