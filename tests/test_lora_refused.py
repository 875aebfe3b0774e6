"""Adapters that are not for the model, or ask for what is not served: one error that names every reason."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from peft_files import base_of, error_of, pair, write_adapter
from tiny import write_model

from realm_jax import lora
from realm_jax.lora import Base

Q = "model.layers.0.self_attn.q_proj"
NAME = "blk.0.attn_q.weight"
ROWS = pair(Q, 64, 64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of(write_model(tmp_path_factory.mktemp("lora") / "tiny.gguf", layers=1))


def gguf_file(path: Path, tensors: dict[str, np.ndarray], **metadata: object) -> Path:
    """An adapter with these tensors; metadata: keys to change, dots as underscores, None = left out."""
    keys = {"general_type": "adapter", "adapter_type": "lora", "adapter_lora_alpha": 8.0} | metadata
    writer = gguf.GGUFWriter(path, str(keys.pop("general_architecture", "llama")))
    for key, value in keys.items():
        name = key.replace("_", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ab(name: str = NAME, outputs: int = 64, inputs: int = 64, rank: int = 4) -> dict[str, np.ndarray]:
    a, b = np.ones((rank, inputs), np.float32), np.ones((outputs, rank), np.float32)
    return {f"{name}.lora_a": a, f"{name}.lora_b": b}


NAN = {**ab(), f"{NAME}.lora_b": np.full((64, 4), np.nan, np.float32)}
GGUF_CASES = {
    "wrong base": (ab(), {"general_architecture": "qwen2"}, "the adapter is for qwen2; tiny.gguf is llama"),
    "a model": (ab(), {"general_type": "model"}, "general.type is model, not adapter"),
    "another kind": (ab(), {"adapter_type": "control"}, "adapter.type is control; lora is supported"),
    "alpha": (ab(), {"adapter_lora_alpha": float("nan")}, "adapter.lora.alpha is nan"),
    "alpha text": (ab(), {"adapter_lora_alpha": "8"}, "adapter.lora.alpha is 8; it must be a finite number"),
    "nothing": ({"output_norm.weight": np.ones(64, np.float32)}, {}, "changes nothing"),
    "shapes": (
        ab(inputs=32) | ab("blk.0.ffn_up.weight") | ab("blk.7.attn_q.weight"),
        {},
        "attn_q.weight: the product is [64, 32], expected [64, 64]; blk.0.ffn_up.weight: the product is "
        "[64, 64], expected [96, 64]; blk.7.attn_q.weight: the model has no tensor blk.7.attn_q.weight",
    ),
    "rank": (ab(rank=65), {}, "attn_q.weight: rank is 65; it must be from 1 to 64"),
    "half": ({f"{NAME}.lora_a": np.ones((4, 64), np.float32)}, {}, f"{NAME}.lora_b is missing"),
    "ranks": (
        {**ab(rank=3), f"{NAME}.lora_b": np.ones((64, 4), np.float32)},
        {},
        "lora_a has rank 3, lora_b 4",
    ),
    "a vector": (ab("output_norm.weight"), {}, "the tensor is no matrix but [64]"),
    "nan": (NAN, {}, f"values are NaN or infinite: {NAME}.lora_b"),
    "suffix": (ab() | {"blk.0.attn_q.weight": np.ones((64, 64), np.float32)}, {}, "is no .lora_a or .lora_b"),
    "norm": (ab() | {"blk.0.attn_norm.weight": np.ones(32, np.float32)}, {}, "is [32], expected [64]"),
    "integers": (
        {f"{NAME}.lora_a": np.ones((4, 64), np.int8)} | {f"{NAME}.lora_b": ab()[f"{NAME}.lora_b"]},
        {},
        "lora_a is I8; a pair is made of floats",
    ),
}


@pytest.mark.parametrize("case", GGUF_CASES)
def test_gguf(case: str, base: Base, tmp_path: Path):
    tensors, metadata, message = GGUF_CASES[case]
    assert message in error_of(gguf_file(tmp_path / "bad.gguf", tensors, **metadata), base)


def test_pairs_may_be_quantized(base: Base, tmp_path: Path):
    kind = gguf.GGMLQuantizationType.Q8_0
    values = np.random.default_rng(0).standard_normal((4, 64), np.float32)
    writer = gguf.GGUFWriter(tmp_path / "q8.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_tensor(f"{NAME}.lora_a", gguf.quantize(values, kind), raw_dtype=kind)
    writer.add_tensor(f"{NAME}.lora_b", np.ones((64, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    delta = lora.read(tmp_path / "q8.gguf", base).deltas[NAME]
    np.testing.assert_array_equal(delta.a, gguf.dequantize(gguf.quantize(values, kind), kind))
    assert delta.b.dtype == np.float32 and (delta.b == 1).all()


def test_experts_are_refused(fixtures: Path, tmp_path: Path):
    base = base_of(fixtures / "arch" / "llama-moe" / "model.gguf")
    path = gguf_file(tmp_path / "moe.gguf", ab("blk.0.ffn_gate_exps.weight"))
    assert "adapters of expert matrices are not supported" in error_of(path, base)
    folder = write_adapter(tmp_path / "moe", pair("model.layers.0.block_sparse_moe.experts.0.w1", 96, 64))
    assert "adapters of expert matrices are not supported" in error_of(folder, base)


PEFT_CASES: dict[str, tuple[dict[str, np.ndarray], dict[str, object], str]] = {
    "kind": (ROWS, {"peft_type": "IA3"}, "peft_type is IA3; LORA is supported"),
    "rank": (ROWS, {"r": 8}, "q_proj: rank is 4; adapter_config.json says 8"),
    "huge rank": (pair(Q, 64, 64, rank=65), {"r": 65}, "rank is 65; it must be from 1 to 64"),
    "no rank": (ROWS, {"r": 0}, "r is 0; it must be a whole number from 1"),
    "alpha": (ROWS, {"lora_alpha": float("inf")}, "lora_alpha is inf; it must be a finite number"),
    "shapes": (
        pair(Q, 32, 64) | pair("model.layers.0.mlp.up_proj", 64, 64),
        {},
        "mlp.up_proj: the product is [64, 64], expected [96, 64]; model.layers.0.self_attn.q_proj: the "
        "product is [32, 64], expected [64, 64]",
    ),
    "half": (
        {f"{Q}.lora_A.weight": ROWS[f"{Q}.lora_A.weight"]},
        {},
        "A is [4, 64] and B missing, which is no pair",
    ),
    "unknown": (
        ROWS | pair("model.vision.q_proj", 64, 64),
        {},
        "vision.q_proj.lora_A.weight belongs to no tensor",
    ),
    "layer": (pair(Q.replace("0", "00"), 64, 64), {}, "belongs to no tensor of the model"),
    "nan": (ROWS | {f"{Q}.lora_B.weight": np.full((64, 4), np.inf, np.float32)}, {}, "NaN or infinite"),
    "float64": (ROWS | {f"{Q}.lora_B.weight": np.full((64, 4), 1e300)}, {}, "NaN or infinite"),
    "integers": (
        ROWS | {f"{Q}.lora_B.weight": np.ones((64, 4), np.int32)},
        {},
        "is I32; supported: F32, F16",
    ),
    "twice": (ROWS | pair(Q.replace("q_", "qkv_"), 128, 64), {}, "two modules change the same rows"),
    "dora": (ROWS, {"use_dora": True}, "use_dora is true, which its tensors contradict"),
    "magnitude": (ROWS | {"lm_head.lora_magnitude_vector": np.ones(320, np.float32)}, {}, "but no A and B"),
    "bias": (ROWS | {f"{Q}.bias": np.ones(64, np.float32)}, {}, "has a bias, but bias is none"),
    "no bias": (
        ROWS | {f"{Q}.bias": np.ones(64, np.float32)},
        {"bias": "all"},
        "has no tensor blk.0.attn_q.bias",
    ),
    "lora bias": (ROWS | {f"{Q}.lora_B.bias": np.ones(64, np.float32)}, {}, "lora_bias is not supported"),
    "unsaved": (ROWS | {"lm_head.weight": np.ones((320, 64), np.float32)}, {}, "is not in modules_to_save"),
    "saved": (ROWS, {"modules_to_save": ["lm_head"]}, "lm_head has no tensors, but is in modules_to_save"),
    "pissa": (
        ROWS,
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights is pissa_niter_4, which changes",
    ),
    "expression": (ROWS, {"target_modules": "(q_proj"}, "no regular expression: missing )"),
    "pattern": (ROWS, {"layers_pattern": "h"}, "layers_pattern is h; layers is supported"),
} | {
    key: (ROWS, {key: value}, f"not supported (merge the adapter where it was trained): {key} = ")
    for key, value in {
        "layer_replication": [[0, 1], [0, 1]],
        "megatron_config": {"a": 1},
        "lora_bias": True,
        "loftq_config": {"loftq_bits": 4},
        "trainable_token_indices": [1, 2],
        "target_parameters": ["mlp.experts"],
        "use_qalora": True,
        "alora_invocation_tokens": [5],
        "a_field_of_tomorrow": "on",
    }.items()
}


@pytest.mark.parametrize("case", PEFT_CASES)
def test_peft(case: str, base: Base, tmp_path: Path):
    tensors, config, message = PEFT_CASES[case]
    assert message in error_of(write_adapter(tmp_path, tensors, **config), base)
