"""A tiny random hybrid model as a GGUF file: gated delta nets, and gated attention in some layers."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tiny import VOCAB, add_vocabulary

WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 32, 96
KEY_HEADS, VALUE_HEADS, DELTA_DIM, TAPS = 2, 4, 16, 4
VALUES = VALUE_HEADS * DELTA_DIM
CHANNELS = 2 * KEY_HEADS * DELTA_DIM + VALUES


def write_hybrid(
    path: Path,
    *,
    layers: int = 2,
    period: int = 2,
    drafting_layers: int = 0,
    seed: int = 0,
    metadata: Mapping[str, int] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A qwen35 of random float32 weights, its vocabulary that of `tiny`; returns its path.

    period: each layer of that number has attention. metadata: keys that stand for those of the model.
    kinds: as in `tiny.write_model`.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "qwen35")
    numbers = {**_numbers(layers, period, drafting_layers), **(metadata or {})}
    for key, value in numbers.items():
        writer.add_uint32(f"qwen35.{key}", value)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_sections([3, 3, 2, 0])
    add_vocabulary(writer)

    def matrix(name: str, *shape: int) -> None:
        numbers = rng.standard_normal(shape, np.float32) * 1.5 / shape[-1] ** 0.5
        kind = (kinds or {}).get(name.rpartition(".")[2], gguf.GGMLQuantizationType.F32)
        writer.add_tensor(f"{name}.weight", gguf.quantize(numbers, kind), raw_dtype=kind)

    def norm(name: str, size: int = WIDTH) -> None:
        writer.add_tensor(f"{name}.weight", 1 + 0.1 * rng.standard_normal(size, np.float32))

    def delta_net(block: str) -> None:
        matrix(f"{block}.attn_qkv", CHANNELS, WIDTH)
        matrix(f"{block}.attn_gate", VALUES, WIDTH)
        matrix(f"{block}.ssm_beta", VALUE_HEADS, WIDTH)
        matrix(f"{block}.ssm_alpha", VALUE_HEADS, WIDTH)
        matrix(f"{block}.ssm_conv1d", CHANNELS, TAPS)
        writer.add_tensor(f"{block}.ssm_a", -rng.uniform(0.02, 0.5, VALUE_HEADS).astype(np.float32))
        writer.add_tensor(f"{block}.ssm_dt.bias", rng.standard_normal(VALUE_HEADS, np.float32))
        norm(f"{block}.ssm_norm", DELTA_DIM)
        matrix(f"{block}.ssm_out", WIDTH, VALUES)

    def attention(block: str) -> None:
        matrix(f"{block}.attn_q", 2 * HEADS * HEAD_DIM, WIDTH)
        matrix(f"{block}.attn_k", KV_HEADS * HEAD_DIM, WIDTH)
        matrix(f"{block}.attn_v", KV_HEADS * HEAD_DIM, WIDTH)
        norm(f"{block}.attn_q_norm", HEAD_DIM)
        norm(f"{block}.attn_k_norm", HEAD_DIM)
        matrix(f"{block}.attn_output", WIDTH, HEADS * HEAD_DIM)

    matrix("token_embd", VOCAB, WIDTH)
    norm("output_norm")
    matrix("output", VOCAB, WIDTH)
    for i in range(layers + drafting_layers):
        norm(f"blk.{i}.attn_norm")
        (attention if i >= layers or i % period == period - 1 else delta_net)(f"blk.{i}")
        norm(f"blk.{i}.post_attention_norm")
        matrix(f"blk.{i}.ffn_gate", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_up", FFN, WIDTH)
        matrix(f"blk.{i}.ffn_down", WIDTH, FFN)
        if i >= layers:
            matrix(f"blk.{i}.nextn.eh_proj", WIDTH, 2 * WIDTH)
            norm(f"blk.{i}.nextn.enorm")
            norm(f"blk.{i}.nextn.hnorm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _numbers(layers: int, period: int, drafting_layers: int) -> dict[str, int]:
    return {
        "block_count": layers + drafting_layers,
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
        "full_attention_interval": period,
        **({"nextn_predict_layers": drafting_layers} if drafting_layers else {}),
    }
