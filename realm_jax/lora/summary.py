"""What an adapter's file says, without a base model."""

from collections import Counter
from pathlib import Path
from typing import Any

from realm_jax import gguf
from realm_jax.lora.gguf_adapter import EMBEDDING, A, B, alpha_of
from realm_jax.lora.peft import CONFIG, parsed_name
from realm_jax.lora.peft_config import read_config
from realm_jax.lora.safetensors_file import SafetensorsFile


def summarize_gguf(path: Path) -> dict[str, Any]:
    """Facts from the metadata and the tensor index of a GGUF adapter."""
    with gguf.open(path) as file:
        alpha, tensors = alpha_of(file), file.tensors
        ranks = Counter(
            info.shape[-1] if name == EMBEDDING + A else (1, *info.shape)[-2]
            for name, info in tensors.items()
            if name.endswith(A)
        )
        return {
            "file": str(path),
            "format": "gguf",
            "architecture": str(file.metadata.get("general.architecture")),
            "bytes": file.nbytes,
            "alpha": alpha,
            "ranks": dict(sorted(ranks.items())),
            "pairs": sum(name.endswith(A) for name in tensors),
            "targets": _counted(name.removesuffix(A) for name in tensors if name.endswith(A)),
            "whole": [name for name in tensors if not name.endswith((A, B))],
            "dora": False,
            "types": dict(Counter(info.ggml_type.name for info in tensors.values()).most_common()),
        }


def summarize_peft(path: Path) -> dict[str, Any]:
    """Facts from the configuration and the header of a PEFT adapter."""
    config = read_config(path.parent / CONFIG)
    file = SafetensorsFile(path)
    parsed = {name: parsed_name(name) for name in file.entries}
    first = {key: file.entries[name].shape for name, (_, key, kind) in parsed.items() if kind == "A"}
    return {
        "file": str(path),
        "format": "peft",
        "architecture": None,
        "bytes": path.stat().st_size,
        "alpha": config.alpha,
        "ranks": dict(sorted(Counter(shape[0] for shape in first.values() if shape).items())),
        "pairs": len(first),
        "targets": _counted(key + ".weight" for key in first),
        "whole": [name for name, (_, _, kind) in parsed.items() if kind in ("weight", "bias")],
        "dora": config.dora,
        "types": dict(Counter(entry.dtype for entry in file.entries.values()).most_common()),
    }


def _counted(names: Any) -> dict[str, int]:
    """How many layers each kind of matrix is changed in."""
    return dict(Counter(name.removesuffix(".weight").rpartition(".")[2] for name in names).most_common())
