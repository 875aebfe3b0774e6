"""The files that bench_cpu measures, made once and kept under the cache directory.

Forms of the default model are made by llama.cpp's own quantizer, so that both sides read the same bits;
random models have the shapes of larger ones.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from realm_jax import RequestError, hub
from realm_jax import gguf as container

POOL = 1 << 22  # random numbers that are quantized once and written again and again


@dataclass(frozen=True)
class Shape:
    """Sizes of a model of the llama architecture, its head not tied to the embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int = 8192

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and NumPy shape of each, in file order."""
        head = self.hidden // self.heads
        square, kv = (self.hidden, self.hidden), (self.kv_heads * head, self.hidden)
        up = (self.ffn, self.hidden)
        yield "token_embd", (self.vocab, self.hidden)
        yield "output", (self.vocab, self.hidden)
        for i in range(self.layers):
            yield f"blk.{i}.attn_norm", (self.hidden,)
            yield f"blk.{i}.attn_q", square
            yield f"blk.{i}.attn_k", kv
            yield f"blk.{i}.attn_v", kv
            yield f"blk.{i}.attn_output", square
            yield f"blk.{i}.ffn_norm", (self.hidden,)
            yield f"blk.{i}.ffn_gate", up
            yield f"blk.{i}.ffn_up", up
            yield f"blk.{i}.ffn_down", up[::-1]
        yield "output_norm", (self.hidden,)


SHAPE_1B = Shape(hidden=2048, layers=22, heads=32, kv_heads=4, ffn=5632, vocab=32000)  # TinyLlama's
SHAPE_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=8, ffn=14336, vocab=128256)  # Llama 3's
FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k_m": 15, "q6_k": 18, "bf16": 32}  # llama.cpp's numbers
RANDOM = {
    "1b_q4_0": (SHAPE_1B, GGMLQuantizationType.Q4_0),
    "1b_q8_0": (SHAPE_1B, GGMLQuantizationType.Q8_0),
    "8b_q4_0": (SHAPE_8B, GGMLQuantizationType.Q4_0),
}


@dataclass(frozen=True)
class Requantized:
    """A file that llama.cpp's quantizer makes of another."""

    source: Path
    path: Path
    file_type: int


def model_file(name: str) -> Path | Requantized:
    """The file of that name, or a path ending in .gguf; random models are written if they are missing."""
    if name.endswith(".gguf"):
        return hub.resolve(name)
    if name not in (names := ("q4_1", *FILE_TYPES, *RANDOM)):
        raise RequestError(f"unknown model {name}; known: {', '.join(names)}, or a path that ends in .gguf")
    folder, default = hub.cache_dir() / "bench", hub.resolve(None)
    if name == "q4_1":
        return default
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.gguf"
    if name in FILE_TYPES:
        return path if path.is_file() else Requantized(default, path, FILE_TYPES[name])
    if not path.is_file():
        write_random_model(path, *RANDOM[name], tokenizer_of=default)
    return path


def tensor_types(path: Path) -> dict[str, int]:
    """How many bytes of the file are of which type."""
    found: dict[str, int] = {}
    with container.open(path) as file:
        for tensor in file.tensors.values():
            found[tensor.ggml_type.name] = found.get(tensor.ggml_type.name, 0) + tensor.nbytes
    return found


def write_random_model(
    path: Path, shape: Shape, ggml_type: GGMLQuantizationType, *, tokenizer_of: Path, seed: int = 0
) -> Path:
    """A model of random weights, its matrices of one type, stands at the path; returns it.

    Weights have a standard deviation of 1 / sqrt(inputs), norms are 1: what it computes is finite. The
    tokenizer is another file's, cut or padded to the shape's vocabulary. Memory stays small: matrices
    are written from a pool of numbers, each from random places in it to its end.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(partial, "llama")
    _add_shape(writer, shape)
    with container.open(tokenizer_of) as file:
        _add_tokenizer(writer, file.metadata, shape.vocab)
    for name, size in shape.tensors():
        of = GGMLQuantizationType.F32 if len(size) == 1 else ggml_type
        writer.add_tensor_info(f"{name}.weight", size, np.dtype(np.float32), _nbytes(size, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng, pools = np.random.default_rng(seed), dict[int, np.ndarray]()
    with partial.open("ab") as file:
        for _, size in shape.tensors():
            file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))
            if len(size) == 1:
                file.write(np.ones(size, np.float32).data)
                continue
            if size[1] not in pools:
                pools[size[1]] = _pool(rng, size[1], ggml_type)
            for part in _drawn(rng, pools[size[1]], _nbytes(size, ggml_type)):
                file.write(part)
    partial.rename(path)
    return path


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocab)


def _add_tokenizer(writer: gguf.GGUFWriter, metadata: Mapping[str, Any], vocab: int) -> None:
    """The keys of a tokenizer, for the first `vocab` of its tokens, or for all and unused ones after them."""
    known = list(metadata["tokenizer.ggml.tokens"])
    tokens = known[:vocab] + [f"<unused_{i}>" for i in range(len(known), vocab)]
    for key, value in metadata.items():
        if not key.startswith("tokenizer."):
            continue
        if key.endswith(".tokens"):
            writer.add_array(key, tokens)
        elif key.endswith(".token_type"):
            writer.add_array(key, _resized(value, vocab, int(gguf.TokenType.UNUSED)))
        elif key.endswith(".scores"):
            writer.add_array(key, _resized(value, vocab, -1e9))
        elif key.endswith(".merges"):
            kept = set(tokens)
            writer.add_array(key, [pair for pair in value if pair.replace(" ", "") in kept])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)


def _resized(values: np.ndarray, count: int, fill: float) -> list[float]:
    kept = values[:count].tolist()
    return kept + [fill] * (count - len(kept))


def _nbytes(size: tuple[int, ...], of: GGMLQuantizationType) -> int:
    block, nbytes = GGML_QUANT_SIZES[of]
    if size[-1] % block:
        raise RequestError(f"rows of {size[-1]} numbers do not divide into blocks of {block} ({of.name})")
    return int(np.prod(size)) // block * nbytes


def _pool(rng: np.random.Generator, inputs: int, of: GGMLQuantizationType) -> np.ndarray:
    """[blocks, bytes of a block]: random numbers of that type."""
    numbers = rng.standard_normal(POOL, np.float32) / np.float32(inputs**0.5)
    try:
        quantized = gguf.quants.quantize(numbers, of)
    except NotImplementedError:  # gguf-py reads this type and does not write it
        raise RequestError(f"random models are not written in {of.name}; choose Q4_0, Q8_0 or BF16") from None
    return quantized.view(np.uint8).reshape(-1, GGML_QUANT_SIZES[of][1])


def _drawn(rng: np.random.Generator, pool: np.ndarray, nbytes: int) -> Iterator[memoryview]:
    """So many bytes of the pool's blocks."""
    flat, width = pool.reshape(-1), pool.shape[1]
    while nbytes:
        start = int(rng.integers(len(pool))) * width
        part = flat[start : start + nbytes]
        nbytes -= part.nbytes
        yield part.data
