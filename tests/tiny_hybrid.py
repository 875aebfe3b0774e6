"""Tiny random hybrid models as GGUF files: gated delta nets, and gated attention in some layers."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tiny import VOCAB, add_vocabulary

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 32, 96
EXPERTS, USED_EXPERTS = 4, 2
KEY_HEADS, VALUE_HEADS, DELTA_DIM, TAPS = 2, 4, 16, 4
VALUES = VALUE_HEADS * DELTA_DIM
CHANNELS = 2 * KEY_HEADS * DELTA_DIM + VALUES
NUMBERS = {
    "context_length": 2048,
    "embedding_length": WIDTH,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "rope.dimension_count": 16,
    "ssm.conv_kernel": TAPS,
    "ssm.inner_size": VALUES,
    "ssm.state_size": DELTA_DIM,
    "ssm.time_step_rank": VALUE_HEADS,
    "ssm.group_count": KEY_HEADS,
}
OF_EXPERTS = {
    "expert_count": EXPERTS,
    "expert_used_count": USED_EXPERTS,
    "expert_feed_forward_length": FFN,
    "expert_shared_feed_forward_length": FFN,
}
Kinds = Mapping[str, gguf.GGMLQuantizationType]


def write_hybrid(
    path: Path,
    *,
    architecture: str = "qwen35",
    layers: int = 2,
    period: int = 2,
    drafting_layers: int = 0,
    metadata: Mapping[str, int] | None = None,
    kinds: Kinds | None = None,
) -> Path:
    """A qwen35, qwen35moe or qwen3next of random float32 weights, with the vocabulary of `tiny`; its path.

    period: each layer of that number has attention. metadata: keys that stand for those of the model.
    kinds: as in `tiny.write_model`.
    """
    numbers = {"block_count": layers + drafting_layers, "full_attention_interval": period, **NUMBERS}
    numbers |= {"nextn_predict_layers": drafting_layers} if drafting_layers else {}
    numbers |= OF_EXPERTS if architecture != "qwen35" else {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (numbers | dict(metadata or {})).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_sections([3, 3, 2, 0])
    add_vocabulary(writer)
    tensors = _Tensors(writer, architecture, kinds or {})
    tensors.matrix("token_embd", VOCAB, WIDTH)
    tensors.norm("output_norm")
    tensors.matrix("output", VOCAB, WIDTH)
    for i in range(layers):
        tensors.layer(f"blk.{i}", has_attention=i % period == period - 1)
    for i in range(layers, layers + drafting_layers):
        tensors.layer(f"blk.{i}", has_attention=True)
        tensors.matrix(f"blk.{i}.nextn.eh_proj", WIDTH, 2 * WIDTH)
        tensors.norm(f"blk.{i}.nextn.enorm")
        tensors.norm(f"blk.{i}.nextn.hnorm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Tensors:
    """Random tensors, added to a file."""

    def __init__(self, writer: gguf.GGUFWriter, architecture: str, kinds: Kinds) -> None:
        self._writer, self._architecture, self._kinds = writer, architecture, kinds
        self._rng = np.random.default_rng(0)

    def matrix(self, name: str, *shape: int) -> None:
        values = self._rng.standard_normal(shape, np.float32) * 1.5 / shape[-1] ** 0.5
        kind = self._kinds.get(name.rpartition(".")[2], gguf.GGMLQuantizationType.F32)
        self._writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)

    def norm(self, name: str, size: int = WIDTH) -> None:
        self._writer.add_tensor(f"{name}.weight", 1 + 0.1 * self._rng.standard_normal(size, np.float32))

    def layer(self, block: str, *, has_attention: bool) -> None:
        self.norm(f"{block}.attn_norm")
        (self._attention if has_attention else self._delta_net)(block)
        self.norm(f"{block}.post_attention_norm")
        if self._architecture == "qwen35":
            self._feed_forward(block, "")
            return
        self._feed_forward(block, "_shexp")
        self._feed_forward(block, "_exps", EXPERTS)
        self.matrix(f"{block}.ffn_gate_inp", EXPERTS, WIDTH)
        self.matrix(f"{block}.ffn_gate_inp_shexp", WIDTH)

    def _delta_net(self, block: str) -> None:
        self.matrix(f"{block}.attn_qkv", CHANNELS, WIDTH)
        self.matrix(f"{block}.attn_gate", VALUES, WIDTH)
        if self._architecture == "qwen3next":
            self.matrix(f"{block}.ssm_ba", 2 * VALUE_HEADS, WIDTH)
        else:
            self.matrix(f"{block}.ssm_beta", VALUE_HEADS, WIDTH)
            self.matrix(f"{block}.ssm_alpha", VALUE_HEADS, WIDTH)
        self.matrix(f"{block}.ssm_conv1d", CHANNELS, TAPS)
        rates, biases = self._rng.uniform(0.02, 0.5, VALUE_HEADS), self._rng.standard_normal(VALUE_HEADS)
        self._writer.add_tensor(f"{block}.ssm_a", -rates.astype(np.float32))
        self._writer.add_tensor(f"{block}.ssm_dt.bias", biases.astype(np.float32))
        self.norm(f"{block}.ssm_norm", DELTA_DIM)
        self.matrix(f"{block}.ssm_out", WIDTH, VALUES)

    def _attention(self, block: str) -> None:
        self.matrix(f"{block}.attn_q", 2 * HEADS * HEAD_DIM, WIDTH)
        self.matrix(f"{block}.attn_k", KV_HEADS * HEAD_DIM, WIDTH)
        self.matrix(f"{block}.attn_v", KV_HEADS * HEAD_DIM, WIDTH)
        self.norm(f"{block}.attn_q_norm", HEAD_DIM)
        self.norm(f"{block}.attn_k_norm", HEAD_DIM)
        self.matrix(f"{block}.attn_output", WIDTH, HEADS * HEAD_DIM)

    def _feed_forward(self, block: str, name: str, *lead: int) -> None:
        self.matrix(f"{block}.ffn_gate{name}", *lead, FFN, WIDTH)
        self.matrix(f"{block}.ffn_up{name}", *lead, FFN, WIDTH)
        self.matrix(f"{block}.ffn_down{name}", *lead, WIDTH, FFN)
