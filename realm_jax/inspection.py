"""What a GGUF file holds, without loading it: facts, sizes, and a check of every tensor."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from realm_jax import weights
from realm_jax.architectures import read_config
from realm_jax.cache import cached_bytes
from realm_jax.chat import ChatTemplate
from realm_jax.config import ModelConfig, Numerics
from realm_jax.gguf import GGUFFile, TensorInfo
from realm_jax.kernels import native
from realm_jax.quant import dequantize
from realm_jax.recurrent_cache import state_bytes
from realm_jax.tokenizer import Tokenizer

NUMERICS = {
    "quantized": Numerics("bfloat16", "bfloat16", "quantized", "native"),
    "bfloat16": Numerics("bfloat16", "bfloat16", "dense", "xla"),
    "float32": Numerics("float32", "float32", "dense", "xla"),
}
CHECKED_VALUES = 1 << 22  # values expanded at a time


@dataclass(frozen=True)
class Problem:
    """A tensor that holds what no model should."""

    tensor: str
    what: str


def describe(file: GGUFFile) -> dict[str, Any]:
    """Facts for a person or a script; raises what loading would, short of reading the weights."""
    name = file.path.name
    config = read_config(file)
    weights.check_tensors(file, config)
    tokenizer = Tokenizer.from_metadata(file.metadata, name)
    template = ChatTemplate.from_metadata(file.metadata, name)
    mix = Counter[str]()
    for tensor in file.tensors.values():
        mix[tensor.ggml_type.name] += tensor.nbytes
    return {
        "file": str(file.path),
        "name": file.metadata.get("general.name"),
        "architecture": config.architecture,
        "parameters": sum(prod(tensor.shape) for tensor in file.tensors.values()),
        "file_bytes": file.nbytes,
        "quantization": dict(mix.most_common()),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "ffn_size": config.ffn_size,
        "experts": config.moe.num_experts if config.moe else 0,
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "tokenizer": tokenizer.kind,
        "chat_template": template is not None,
        "memory_bytes": memory(file, config),
        "default_storage": {"cpu": "bfloat16" if native.problem() else "quantized"}
        | dict.fromkeys(("gpu", "tpu"), "bfloat16"),
    }


def memory(file: GGUFFile, config: ModelConfig) -> dict[str, dict[str, int]]:
    """Bytes that a run needs, by arithmetic: the weights, the cache of 1,024 tokens of one sequence, and what
    recurrent layers keep of a sequence."""
    return {
        name: {
            "weights": weights.planned_bytes(file, config, numerics),
            "cache_per_1024_tokens": 1024 * cached_bytes(config, numerics.kv_dtype),
            "state_per_sequence": state_bytes(config),
        }
        for name, numerics in NUMERICS.items()
    }


def check(file: GGUFFile, on_tensor: Callable[[TensorInfo], object] | None = None) -> list[Problem]:
    """Every tensor expanded and looked at: values not finite or out of range, matrices of zeros."""
    problems = []
    for tensor in file.tensors.values():
        parts = list(_findings(file, tensor))
        broken = sum(count for count, _ in parts)
        if broken:
            problems.append(
                Problem(tensor.name, f"{broken:,} of {prod(tensor.shape):,} values are not finite")
            )
        elif len(tensor.shape) > 1 and not any(largest for _, largest in parts):
            problems.append(Problem(tensor.name, "all values are zero"))
        elif (largest := max(largest for _, largest in parts)) > 1e6:
            problems.append(
                Problem(tensor.name, f"the largest value is {largest:.3g}, out of range for a weight")
            )
        if on_tensor is not None:
            on_tensor(tensor)
    return problems


def _findings(file: GGUFFile, tensor: TensorInfo) -> Iterator[tuple[int, float]]:
    """Of each slice of rows: how many values are not finite, and the largest of the others."""
    data = file.data(tensor.name)
    width = tensor.shape[-1]
    rows = prod(tensor.shape) // width
    each = tensor.nbytes // rows
    step = max(1, CHECKED_VALUES // width)
    for start in range(0, rows, step):
        part = data[start * each : (start + step) * each]
        values = dequantize(part, tensor.ggml_type, (len(part) // each, width))
        finite = np.isfinite(values)
        yield (
            int(values.size - finite.sum()),
            float(np.abs(values, where=finite, out=np.zeros_like(values)).max()),
        )
