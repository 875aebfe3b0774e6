"""Models of the golden data with other keys and tensors, for what no golden model has.

Run as a script, where llama-cpp-python is installed, it writes their golden logits to `variants.npz`:
`python tests/variants.py path/to/fixtures`.
"""

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

GOLDEN = Path(__file__).with_name("variants.npz")
TOKENS = 48
Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    """A golden model of another name, with keys set and tensors changed."""

    base: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Tensors, np.random.Generator], None] = lambda tensors, rng: None
    architecture: str | None = None  # that of the base


def _selection_bias(tensors: Tensors, rng: np.random.Generator) -> None:
    tensors["blk.1.exp_probs_b.bias"] = 0.3 * rng.standard_normal(4, np.float32)


def _no_second_norm(tensors: Tensors, rng: np.random.Generator) -> None:
    for name in [name for name in tensors if ".ffn_norm." in name]:
        del tensors[name]


def _second_norm(tensors: Tensors, rng: np.random.Generator) -> None:
    for layer in range(2):
        for suffix, mean in (("weight", 1.0), ("bias", 0.0)):
            vector = mean + 0.2 * rng.standard_normal(64, np.float32)
            tensors[f"blk.{layer}.attn_norm_2.{suffix}"] = vector.astype(np.float32)


def _experts(tensors: Tensors, rng: np.random.Generator) -> None:
    """Four experts and a shared one in place of each feed-forward layer."""
    for name in [name for name in tensors if any(f".ffn_{each}." in name for each in ("gate", "up", "down"))]:
        del tensors[name]
    shapes = {"gate_exps": (4, 96, 64), "up_exps": (4, 96, 64), "down_exps": (4, 64, 96), "gate_inp": (4, 64)}
    shapes |= {"gate_shexp": (40, 64), "up_shexp": (40, 64), "down_shexp": (64, 40)}
    for layer in range(2):
        for name, shape in shapes.items():
            matrix = rng.standard_normal(shape, np.float32) / shape[-1] ** 0.5
            tensors[f"blk.{layer}.ffn_{name}.weight"] = matrix.astype(np.float32)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_shared_feed_forward_length": 40}
VARIANTS = {
    "deepseek3": Variant(
        "deepseek2",
        {
            "expert_gating_func": 2,
            "expert_weights_norm": True,
            "expert_weights_scale": 2.5,
            "expert_group_count": 2,
            "expert_group_used_count": 1,
        },
        _selection_bias,
    ),
    "deepseek2-yarn": Variant("deepseek2", YARN | {"rope.scaling.yarn_log_multiplier": 0.0707}),
    "mistral3-plain-yarn": Variant("mistral3", {"rope.scaling.yarn_log_multiplier": 0.0}),
    "granitemoe": Variant("granite", EXPERTS, _experts, "granitemoe"),
    "stablelm-parallel": Variant("stablelm", change=_no_second_norm),
    "falcon-40b": Variant("falcon", change=_second_norm),
    "olmo3": Variant("olmo2", YARN | {"attention.sliding_window": 8}),
    "gpt-oss-yarn": Variant("gpt-oss", YARN),
}


def write_variant(fixtures: Path, name: str, path: Path) -> Path:
    """The model of this name, written to the path."""
    variant = VARIANTS[name]
    reader = gguf.GGUFReader(fixtures / "arch" / variant.base / "model.gguf")
    values = {key: each.contents() for key, each in reader.fields.items() if not key.startswith("GGUF.")}
    base = values["general.architecture"]
    architecture = variant.architecture or base
    keys = {key.replace(f"{base}.", f"{architecture}.", 1): value for key, value in values.items()}
    keys |= {f"{architecture}.{key}": value for key, value in variant.keys.items()}
    tensors = {each.name: np.array(each.data) for each in reader.tensors}
    variant.change(tensors, np.random.default_rng(0))
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for tensor, data in tensors.items():
        writer.add_tensor(tensor, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def prompt(fixtures: Path, name: str) -> list[int]:
    """The tokens of its base's golden data."""
    return np.load(fixtures / "arch" / VARIANTS[name].base / "expected.npz")["tokens"].tolist()


def _llama_cpps(path: Path, tokens: list[int]) -> np.ndarray:
    """The logits of all positions, as llama.cpp computes them in float32."""
    import ctypes
    import importlib

    api: Any = importlib.import_module("llama_cpp.llama_cpp")
    log = api.llama_log_callback(lambda level, text, data: None)
    api.llama_log_set(log, None)
    model = api.llama_model_load_from_file(bytes(path), api.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp could not load {path.name}")
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.flash_attn_type = 256, 1, 0
    settings.type_k = settings.type_v = 0  # float32
    context = api.llama_init_from_model(model, settings)
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    if api.llama_decode(context, batch):
        raise SystemExit(f"llama.cpp could not compute {path.name}")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    rows = [api.llama_get_logits_ith(context, i) for i in range(len(tokens))]
    found = np.stack(
        [
            np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (vocabulary,))
            for row in rows
        ]
    )
    return found.copy()


def main() -> None:
    fixtures, golden = Path(sys.argv[1]), {}
    with tempfile.TemporaryDirectory() as folder:
        for name in VARIANTS:
            path = write_variant(fixtures, name, Path(folder) / f"{name}.gguf")
            golden[name] = _llama_cpps(path, prompt(fixtures, name))[[15, 31, 47]]
    np.savez(GOLDEN, **golden)


if __name__ == "__main__":
    main()
