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
    """A golden model of another name, with keys set (None: left out) and tensors changed.

    is_another: its logits differ from those of the base.
    """

    base: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[Tensors, np.random.Generator], None] = lambda tensors, rng: None
    architecture: str | None = None  # that of the base
    is_another: bool = True


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


def _joined_ups(tensors: Tensors, rng: np.random.Generator) -> None:
    """As converters wrote DeepSeek's models before April 2025."""
    for layer in range(2):
        keys, values = (tensors.pop(f"blk.{layer}.attn_{name}_b.weight") for name in "kv")
        both = np.concatenate([keys.swapaxes(1, 2), values], axis=1)
        tensors[f"blk.{layer}.attn_kv_b.weight"] = np.ascontiguousarray(both.reshape(-1, both.shape[-1]))


def _own_head_norms(tensors: Tensors, rng: np.random.Generator) -> None:
    _no_second_norm(tensors, rng)
    for layer in range(2):
        for name in "qk":
            factors = rng.normal(1, 0.3, (2, 32)).astype(np.float32)
            tensors[f"blk.{layer}.attn_{name}_norm.weight"] = factors


def _command_r_plus(tensors: Tensors, rng: np.random.Generator) -> None:
    """llama.cpp expects the norms from 64 layers on."""
    for name in [name for name in tensors if name.startswith("blk.")]:
        layer, rest = name.removeprefix("blk.").split(".", 1)
        for i in range(int(layer), 64, 2):
            tensors[f"blk.{i}.{rest}"] = tensors[name]
    for i in range(64):
        for name, heads in (("q", 4), ("k", 2)):
            tensors[f"blk.{i}.attn_{name}_norm.weight"] = rng.normal(1, 0.3, (heads, 16)).astype(np.float32)


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


def _gemma4(tensors: Tensors, rng: np.random.Generator) -> None:
    """As the smallest published models: inputs of each layer, two wide layers that read earlier keys."""
    _gemma4_layers(tensors, rng, kv_heads=(1, 1, 1, 1), features=(96, 96, 160, 160))
    shapes = {"per_layer_token_embd": (tensors["token_embd.weight"].shape[0], 4 * 8)}
    shapes |= {"per_layer_model_proj": (4 * 8, 64), "per_layer_proj_norm": (8,)}
    for i in range(4):
        shapes |= {f"blk.{i}.inp_gate": (8, 64), f"blk.{i}.proj": (64, 8), f"blk.{i}.post_norm": (64,)}
    _put(tensors, rng, shapes)


def _gemma4_experts(tensors: Tensors, rng: np.random.Generator) -> None:
    """As the published one with experts: layers without a window have fewer keys, and no values."""
    _gemma4_layers(tensors, rng, kv_heads=(2, 1, 2, 1), features=(96,) * 4)
    for i in range(4):
        at = f"blk.{i}."
        shapes = {"gate_inp": (4, 64), "gate_up_exps": (4, 2 * 48, 64), "down_exps": (4, 64, 48)}
        norms = dict.fromkeys(("pre_ffw_norm_2", "post_ffw_norm_1", "post_ffw_norm_2"), (64,))
        _put(tensors, rng, {f"{at}ffn_{name}": shape for name, shape in shapes.items()})
        _put(tensors, rng, {at + name: shape for name, shape in norms.items()})
        for name, size in (("ffn_gate_inp", 64), ("ffn_down_exps", 4)):
            tensors[f"{at}{name}.scale"] = rng.normal(1, 0.3, size).astype(np.float32)
        if i % 2:
            del tensors[f"{at}attn_v.weight"]


def _gemma4_layers(
    tensors: Tensors, rng: np.random.Generator, kv_heads: tuple[int, ...], features: tuple[int, ...]
) -> None:
    """Layers with heads of 16 in windows of 8, and of 32 without, by turns.

    All have tensors for keys and values, as in published files, also those that read an earlier layer's.
    """
    for name in [name for name in tensors if name.startswith("blk.")]:
        del tensors[name]
    tensors["rope_freqs.weight"] = np.array([1.0] * 4 + [1e30] * 12, np.float32)
    for i, (K, F) in enumerate(zip(kv_heads, features, strict=True)):
        H, at = 32 if i % 2 else 16, f"blk.{i}."
        shapes = {"attn_q": (4 * H, 64), "attn_output": (64, 4 * H), "attn_q_norm": (H,)}
        shapes |= {"attn_k": (K * H, 64), "attn_v": (K * H, 64), "attn_k_norm": (H,)}
        shapes |= {"ffn_gate": (F, 64), "ffn_up": (F, 64), "ffn_down": (64, F), "layer_output_scale": (1,)}
        norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
        _put(
            tensors, rng, {at + name: shape for name, shape in (shapes | dict.fromkeys(norms, (64,))).items()}
        )


def _put(tensors: Tensors, rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Random weights that keep the size of what goes through them."""
    for name, shape in shapes.items():
        mean, spread = (1.0, 0.2) if len(shape) == 1 else (0.0, shape[-1] ** -0.5)
        tensors[f"{name}.weight"] = rng.normal(mean, spread, shape).astype(np.float32)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_shared_feed_forward_length": 40}
GEMMA4 = {
    "block_count": 4,
    "embedding_length": 64,
    "attention.head_count": 4,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "attention.key_length_swa": 16,
    "attention.value_length_swa": 16,
    "attention.sliding_window": 8,
    "attention.sliding_window_pattern": [True, False, True, False],
    "rope.dimension_count": 32,
    "rope.dimension_count_swa": 16,
    "rope.freq_base": 1000000.0,
    "rope.freq_base_swa": 10000.0,
    "final_logit_softcapping": 30.0,
}
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
    "deepseek2-joined": Variant(
        "deepseek2",
        {
            "attention.key_length_mla": None,
            "attention.value_length_mla": None,
            "attention.key_length": 24,
            "attention.value_length": 16,
            "attention.head_count_kv": 4,
        },
        _joined_ups,
        is_another=False,
    ),
    "command-r-plus": Variant("command-r", {"block_count": 64}, _command_r_plus),
    "mistral3-plain-yarn": Variant("mistral3", {"rope.scaling.yarn_log_multiplier": 0.0}),
    "granitemoe": Variant("granite", EXPERTS, _experts, "granitemoe"),
    "stablelm-parallel": Variant("stablelm", change=_no_second_norm),
    "stablelm-12b": Variant("stablelm", change=_own_head_norms),
    "falcon-40b": Variant("falcon", change=_second_norm),
    "olmo3": Variant("olmo2", YARN | {"attention.sliding_window": 8}),
    "gpt-oss-yarn": Variant("gpt-oss", YARN),
    "gemma4": Variant(
        "gemma3",
        GEMMA4
        | {
            "attention.head_count_kv": 1,
            "attention.shared_kv_layers": 2,
            "feed_forward_length": [96, 96, 160, 160],
            "embedding_length_per_layer_input": 8,
        },
        _gemma4,
        "gemma4",
    ),
    "gemma4-experts": Variant(
        "gemma3",
        GEMMA4
        | {
            "attention.head_count_kv": [2, 1, 2, 1],
            "attention.shared_kv_layers": 0,
            "feed_forward_length": 96,
            "embedding_length_per_layer_input": 0,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": 48,
        },
        _gemma4_experts,
        "gemma4",
    ),
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
        if key != "general.architecture" and value is not None:
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
