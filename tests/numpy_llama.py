"""A llama in float64 NumPy that keeps the inputs of every projection: an oracle, slow and plain."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from realm_jax import gguf
from realm_jax.quant import dequantize

Inputs = dict[tuple[str, int], list[np.ndarray]]
"""By tensor and expert (0 where there are none), the rows that were multiplied by it."""


class NumpyLlama:
    """Of the file: dense or with experts, interleaved rotary positions, grouped queries."""

    def __init__(self, path: Path) -> None:
        with gguf.open(path) as file:
            self.keys = {k.removeprefix("llama."): v for k, v in file.metadata.items()}
            self.tensors = {
                name.removesuffix(".weight"): dequantize(file.data(name), i.ggml_type, i.shape).astype(float)
                for name, i in file.tensors.items()
            }
        self.inputs: Inputs = defaultdict(list)

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T, V] of one window; the inputs of its projections are kept."""
        x = self.tensors["token_embd"][ids]
        for layer in range(self.keys["block_count"]):
            at = f"blk.{layer}."
            x = x + self._attention(at, self._norm(x, at + "attn_norm"))
            inner = self._norm(x, at + "ffn_norm")
            x = x + (self._experts(at, inner) if "expert_count" in self.keys else self._dense(at, inner))
        head = self.tensors.get("output", self.tensors["token_embd"])
        return self._norm(x, "output_norm") @ head.T

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        eps = self.keys["attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.tensors[name]

    def _times(self, x: np.ndarray, name: str) -> np.ndarray:
        self.inputs[f"{name}.weight", 0].append(x)
        return x @ self.tensors[name].T

    def _attention(self, at: str, x: np.ndarray) -> np.ndarray:
        length, heads = len(x), self.keys["attention.head_count"]
        kv_heads = self.keys.get("attention.head_count_kv", heads)
        q, k = (
            self._turned(self._times(x, f"{at}attn_{name}").reshape(length, count, -1))
            for name, count in (("q", heads), ("k", kv_heads))
        )
        v = self._times(x, at + "attn_v").reshape(length, kv_heads, -1)
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores[:, np.triu_indices(length, 1)[0], np.triu_indices(length, 1)[1]] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        return self._times(np.einsum("hqk,khd->qhd", shares, v).reshape(length, -1), at + "attn_output")

    def _turned(self, x: np.ndarray) -> np.ndarray:
        pairs = x.shape[-1] // 2
        base = self.keys.get("rope.freq_base", 10000.0)
        angles = np.arange(len(x))[:, None, None] * base ** (-np.arange(pairs) / pairs)
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    def _dense(self, at: str, x: np.ndarray) -> np.ndarray:
        return self._times(
            _silu(self._times(x, at + "ffn_gate")) * self._times(x, at + "ffn_up"), at + "ffn_down"
        )

    def _experts(self, at: str, x: np.ndarray) -> np.ndarray:
        scores, out = self._times(x, at + "ffn_gate_inp"), np.zeros_like(x)
        for row, score in enumerate(scores):
            chosen = np.argsort(-score)[: self.keys["expert_used_count"]]
            shares = np.exp(score[chosen] - score[chosen].max())
            for expert, share in zip(chosen, shares / shares.sum(), strict=True):
                out[row] += share * self._expert(at, int(expert), x[row])
        return out

    def _expert(self, at: str, expert: int, x: np.ndarray) -> np.ndarray:
        def times(values: np.ndarray, name: str) -> np.ndarray:
            self.inputs[f"{at}{name}.weight", expert].append(values[None])
            return self.tensors[at + name][expert] @ values

        return times(_silu(times(x, "ffn_gate_exps")) * times(x, "ffn_up_exps"), "ffn_down_exps")


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
