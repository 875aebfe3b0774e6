"""Vocabularies to test with: llama.cpp's own, opened once, and small ones as GGUF metadata."""

from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.tokenizer import Tokenizer
from realm_jax.tokenizer.tokenizer import _BYTE_OF_LETTER

LETTERS = list(_BYTE_OF_LETTER)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_opened: dict[str, Tokenizer] = {}


def opened(fixtures: Path, name: str) -> Tokenizer:
    if name not in _opened:
        _opened[name] = Tokenizer.from_gguf(fixtures / "tokenizer" / f"ggml-vocab-{name}.gguf")
    return _opened[name]


def byte_bpe(pre: Any = "smollm", **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE whose tokens are the 256 letters, 'he', 'll', 'hell' and three more."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*LETTERS, "he", "ll", "hell", "<s>", "<|im_end|>", "<user>"],
        "tokenizer.ggml.token_type": np.array([NORMAL] * 259 + [CONTROL, CONTROL, USER_DEFINED], np.int32),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 260,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def spm(pieces: dict[str, float], **changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array(
            [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces), np.int32
        ),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def unigram(pieces: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", *pieces],
        "tokenizer.ggml.scores": np.array([0.0, 0.0, 0.0, *pieces.values()], np.float32),
        "tokenizer.ggml.token_type": np.array([CONTROL, CONTROL, UNKNOWN] + [NORMAL] * len(pieces), np.int32),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def character_map(replacements: dict[int, bytes]) -> np.ndarray:
    """SentencePiece's map for single bytes: the root's children at 256, their replacements at 512."""
    units, texts = np.zeros(1024, "<u4"), b""
    units[0] = 256 << 10
    for byte, text in replacements.items():
        units[256 ^ byte] = byte | 1 << 8 | (256 ^ 512) << 10
        units[512 ^ byte] = 1 << 31 | len(texts)
        texts += text + b"\0"
    blob = (4 * len(units)).to_bytes(4, "little") + units.tobytes() + texts
    return np.frombuffer(blob, np.uint8)
