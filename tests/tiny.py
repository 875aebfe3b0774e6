"""Tiny random models, as GGUF files: small enough to compile in seconds, real enough to run every part."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

VOCAB = 320
SPECIAL = ("<unk>", "<s>", "</s>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_model(
    path: Path,
    *,
    architecture: str = "llama",
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 96,
    context: int = 2048,
    qk_norm: bool = False,
    template: str | None = TEMPLATE,
    seed: int = 0,
    metadata: Mapping[str, int | float | str] | None = None,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    control: tuple[str, ...] = (),
) -> Path:
    """A model of random float32 weights with an SPM vocabulary of 320 tokens; returns its path.

    metadata: further keys. control: texts of the last tokens, which are then control tokens. kinds: the
    types of matrices by the last part of their name, such as attn_q.
    The architecture must name its tensors as llama does: llama, qwen3 (qk_norm).
    """
    rng = np.random.default_rng(seed)
    head_dim = width // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head_dim)
    add_vocabulary(writer, control)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_int32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)  # pyright: ignore[reportArgumentType]: each takes its own type

    def matrix(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape, np.float32) * 1.5 / shape[-1] ** 0.5
        kind = (kinds or {}).get(name.rpartition(".")[2], gguf.GGMLQuantizationType.F32)
        data = _q4_k(values) if kind == gguf.GGMLQuantizationType.Q4_K else gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    def norm(name: str, size: int = width) -> None:
        writer.add_tensor(f"{name}.weight", 1 + 0.1 * rng.standard_normal(size, np.float32))

    matrix("token_embd", VOCAB, width)
    for i in range(layers):
        norm(f"blk.{i}.attn_norm")
        matrix(f"blk.{i}.attn_q", heads * head_dim, width)
        matrix(f"blk.{i}.attn_k", kv_heads * head_dim, width)
        matrix(f"blk.{i}.attn_v", kv_heads * head_dim, width)
        if qk_norm:
            norm(f"blk.{i}.attn_q_norm", head_dim)
            norm(f"blk.{i}.attn_k_norm", head_dim)
        matrix(f"blk.{i}.attn_output", width, heads * head_dim)
        norm(f"blk.{i}.ffn_norm")
        matrix(f"blk.{i}.ffn_gate", ffn, width)
        matrix(f"blk.{i}.ffn_up", ffn, width)
        matrix(f"blk.{i}.ffn_down", width, ffn)
    norm("output_norm")
    matrix("output", VOCAB, width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _q4_k(values: np.ndarray) -> np.ndarray:
    """Rows in Q4_K, which gguf-py cannot write: one scale and one minimum for the 256 values of a block."""
    blocks = values.reshape(-1, 256)
    least = np.minimum(blocks.min(axis=1), 0)
    step = (blocks.max(axis=1) - least) / 15
    codes = np.rint((blocks - least[:, None]) / step[:, None]).astype(np.uint8).reshape(-1, 4, 2, 32)
    factors = np.stack([step, -least], axis=1) / 32  # times eight scales and minima that are all 32
    return np.concatenate(
        [
            factors.astype("<f2").view(np.uint8),
            np.tile(np.array([160] * 8 + [0] * 4, np.uint8), (len(blocks), 1)),
            (codes[:, :, 0] | codes[:, :, 1] << 4).reshape(-1, 128),
        ],
        axis=1,
    ).reshape(*values.shape[:-1], -1)


def add_vocabulary(writer: gguf.GGUFWriter, control: tuple[str, ...] = ()) -> None:
    """Three special tokens, all bytes, and printable pieces: any text can be encoded."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [chr(ord("a") + i) for i in range(26)] + [f"▁{chr(ord('a') + i)}" for i in range(26)] + ["▁"]
    tokens = [*SPECIAL, *pieces, *words]
    tokens += [f"word{i}" for i in range(VOCAB - len(tokens) - len(control))] + [*control]
    kinds = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    kinds += [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (VOCAB - len(kinds) - len(control))
    kinds += [gguf.TokenType.CONTROL] * len(control)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 3 + [float(-i) for i in range(VOCAB - 3)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
