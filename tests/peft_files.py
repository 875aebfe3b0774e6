"""Adapters as PEFT would save them, made by hand, and Hugging Face's view of a model's tensors."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from realm_jax import gguf, lora
from realm_jax.architectures import read_config
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora import Adapter, Base
from realm_jax.lora.fold import fold

ROOT = "base_model.model."
Arrays = Mapping[str, np.ndarray]


def base_of(path: Path) -> Base:
    with gguf.open(path) as file:
        return Base.of(file, read_config(file))


def write_adapter(folder: Path, tensors: Arrays, **config: object) -> Path:
    """A folder with these tensors (names without base_model.model.) and this configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {ROOT + name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors")
    defaults = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": targets(tensors)}
    (folder / "adapter_config.json").write_text(json.dumps(defaults | config))
    return folder


def error_of(path: Path, base: Base) -> str:
    """The one line that reading ends in."""
    with pytest.raises((ModelFileError, UnsupportedError)) as caught:
        lora.read(path, base)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 3000
    return str(caught.value)


def targets(tensors: Arrays) -> list[str]:
    """The modules that have a pair, by their whole names."""
    return sorted({name.split(".lora_")[0] for name in tensors if ".lora_" in name})


def pair(module: str, outputs: int, inputs: int, rank: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """A random A and B of a module."""
    rng = np.random.default_rng([seed, *module.encode()])
    return {
        f"{module}.lora_A.weight": rng.standard_normal((rank, inputs), np.float32),
        f"{module}.lora_B.weight": rng.standard_normal((outputs, rank), np.float32),
    }


def hf_rows(rows: int, heads: int) -> np.ndarray:
    """For each row that Hugging Face has of a llama's q or k, the row of the file that it is."""
    width = rows // heads
    order = [
        head * width + (2 * j if j < width // 2 else 2 * (j - width // 2) + 1)
        for head in range(heads)
        for j in range(width)
    ]
    return np.array(order)


def change(adapter: Adapter, name: str, base: Base) -> np.ndarray:
    """What the adapter adds to a tensor, in the file's order: folded into zeros."""
    return fold(np.zeros(base.shapes[name], np.float32), name, [(adapter, 1.0)], 0)


def product(tensors: Arrays, module: str, scale: float = 2.0) -> np.ndarray:
    """scale * B A, in float64."""
    a, b = (tensors[f"{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
    return scale * b @ a
