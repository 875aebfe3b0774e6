"""Writes tests/data/hybrid.npz: what llama.cpp says of the models of `tiny_hybrid`. Run by hand.

Of each architecture: `tokens` [80], `logits` [20, V] in float32 at every fourth position, of one decode
(float32 cache, no flash attention, one thread), `greedy` [16] the continuation, fed back one token at a time;
`sha256` of the model's file. Needs llama-cpp-python.
"""

import hashlib
import importlib
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tiny import VOCAB
from tiny_hybrid import write_hybrid

ARCHITECTURES = ("qwen35", "qwen35moe", "qwen3next")
LEAST_MARGIN = 0.05
"""Of a greedy token's logit over the second best."""


class Peer:
    """A context of llama.cpp in float32."""

    def __init__(self, path: Path) -> None:
        self._api: Any = importlib.import_module("llama_cpp.llama_cpp")
        self._log = self._api.llama_log_callback(lambda level, text, data: None)
        self._api.llama_log_set(self._log, None)
        self._api.llama_backend_init()
        self._model = self._api.llama_model_load_from_file(
            bytes(path), self._api.llama_model_default_params()
        )
        params = self._api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        params.type_k = params.type_v = 0  # GGML_TYPE_F32
        params.flash_attn_type = 0
        self._context = self._api.llama_init_from_model(self._model, params)

    def logits(self, tokens: list[int], start: int) -> np.ndarray:
        """[T, V] of tokens that stand from `start` on."""
        batch = self._api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        assert self._api.llama_decode(self._context, batch) == 0
        rows = (self._api.llama_get_logits_ith(self._context, i) for i in range(len(tokens)))
        found = np.stack([np.ctypeslib.as_array(row, (VOCAB,)).copy() for row in rows])
        self._api.llama_batch_free(batch)
        return found


def golden(path: Path, tokens: list[int]) -> tuple[np.ndarray, list[int], float]:
    """Logits, greedy continuation, and its smallest margin."""
    peer = Peer(path)
    logits = peer.logits(tokens, 0)
    greedy, least, last = list[int](), np.inf, logits[-1]
    while len(greedy) < 16:
        second, best = np.sort(last)[-2:]
        least = min(least, float(best - second))
        greedy.append(int(last.argmax()))
        last = peer.logits(greedy[-1:], len(tokens) + len(greedy) - 1)[0]
    return logits, greedy, least


def main() -> None:
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ARCHITECTURES:
            path = write_hybrid(Path(folder) / f"{name}.gguf", architecture=name)
            tokens, logits, greedy, least, seed = [0], np.zeros(0), [0], 0.0, -1
            while least < LEAST_MARGIN:
                seed += 1
                tokens = [1, *np.random.default_rng(seed).integers(3, VOCAB, 79).tolist()]
                logits, greedy, least = golden(path, tokens)
            found |= {
                f"{name}_sha256": np.array(hashlib.sha256(path.read_bytes()).hexdigest()),
                f"{name}_tokens": np.array(tokens, np.int32),
                f"{name}_logits": logits[3::4],
                f"{name}_greedy": np.array(greedy, np.int32),
            }
            print(f"{name}: seed {seed}, least margin {least:.3f}")
    target = Path(__file__).parent / "data" / "hybrid.npz"
    target.parent.mkdir(exist_ok=True)
    np.savez_compressed(target, **found)  # pyright: ignore[reportArgumentType]: names of arrays


if __name__ == "__main__":
    main()
