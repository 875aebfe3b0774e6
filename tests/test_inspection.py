"""What `inspect` says is so: planned memory is what a run holds, and every broken tensor is found."""

from pathlib import Path
from typing import Any

import gguf as reference
import jax
import numpy as np
import pytest
from tiny import write_model

from realm_jax import LLM, CapacityError, ModelFileError, UnsupportedError, gguf, inspection, runtime
from realm_jax.config import EngineConfig
from realm_jax.decoding import Autoregressive
from realm_jax.loading import load_model
from realm_jax.model import Transformer
from realm_jax.weights import resident_bytes

TIER_1 = ["llama-mha", "llama-gqa-tied", "llama-bias", "llama-rope-freqs", "llama-moe", "llama-mixed-types"]
TIER_1 += ["qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3-longrope"]


def overwrite(path: Path, name: str, values: float | int, where: Any = ...) -> Path:
    """The file, with some of a tensor's raw values replaced."""
    (tensor,) = (t for t in reference.GGUFReader(path, "r+").tensors if t.name == name)
    tensor.data[where] = values
    return path


def problems(path: Path) -> list[tuple[str, str]]:
    with gguf.open(path) as file:
        return [(problem.tensor, problem.what) for problem in inspection.check(file)]


@pytest.mark.parametrize("case", TIER_1)
@pytest.mark.parametrize("storage", inspection.NUMERICS)
def test_planned_memory_is_what_the_loaded_model_holds(fixtures: Path, case: str, storage: str):
    path = fixtures / "arch" / case / "model.gguf"
    numerics = inspection.NUMERICS[storage]
    model = load_model(path, EngineConfig(dtype=numerics.dtype, weights=numerics.weights))
    with gguf.open(path) as file:
        planned = inspection.describe(file)["memory_bytes"][storage]
    assert planned["weights"] == resident_bytes(model.params)
    caches = Transformer(model.config).empty_caches(4, 256, numerics)
    assert planned["cache_per_1024_tokens"] == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))


@pytest.mark.parametrize("case", TIER_1)
def test_sound_models_have_no_problems(fixtures: Path, case: str):
    assert problems(fixtures / "arch" / case / "model.gguf") == []


def test_facts_are_those_of_the_loaded_model(fixtures: Path):
    for case in TIER_1:
        path = fixtures / "arch" / case / "model.gguf"
        config = load_model(path, EngineConfig()).config
        with gguf.open(path) as file:
            facts = inspection.describe(file)
        for fact, field in {"layers": "num_layers", "heads": "num_heads", "kv_heads": "num_kv_heads"}.items():
            assert facts[fact] == getattr(config, field)
        for fact in ("architecture", "hidden_size", "head_dim", "ffn_size", "vocab_size", "context_length"):
            assert facts[fact] == getattr(config, fact)
        assert sum(facts["quantization"].values()) == sum(
            int(t.n_bytes) for t in reference.GGUFReader(path).tensors
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_one_bad_value_is_found_and_nothing_else(tmp_path: Path, value: float):
    path = overwrite(write_model(tmp_path / "m.gguf"), "blk.1.attn_k.weight", value, (7, 11))
    ((tensor, what),) = problems(path)
    assert tensor == "blk.1.attn_k.weight"
    assert "1 of 2,048 values are not finite" in what if not np.isfinite(value) else "3e+38" in what


def test_a_bad_scale_of_a_quantized_block_is_found(fixtures: Path, tmp_path: Path):
    source = fixtures / "arch" / "llama-mixed-types" / "model.gguf"
    path = tmp_path / "m.gguf"
    path.write_bytes(source.read_bytes())
    quantized = [
        t for t in reference.GGUFReader(path).tensors if t.tensor_type == reference.GGMLQuantizationType.Q8_0
    ]
    overwrite(path, quantized[0].name, 0xFF, (0, slice(0, 2)))  # a float16 of all ones is NaN
    assert problems(path) == [(quantized[0].name, problems(path)[0][1])]
    assert "32 of " in problems(path)[0][1]


def test_a_matrix_of_zeros_is_a_problem_and_a_vector_is_not(tmp_path: Path):
    path = overwrite(write_model(tmp_path / "m.gguf"), "blk.0.attn_norm.weight", 0)
    assert problems(path) == []
    assert problems(overwrite(path, "blk.0.ffn_gate.weight", 0)) == [
        ("blk.0.ffn_gate.weight", "all values are zero")
    ]


def test_every_tensor_is_reported_once(tiny_model: Path):
    seen = []
    with gguf.open(tiny_model) as file:
        inspection.check(file, lambda tensor: seen.append(tensor.name))
        assert seen == list(file.tensors)


def test_describing_a_file_that_lacks_a_tensor_fails(fixtures: Path):
    with (
        gguf.open(fixtures / "bad" / "tensor-missing.gguf") as file,
        pytest.raises(ModelFileError, match=r"blk\.0\.ffn_down\.weight is missing"),
    ):
        inspection.describe(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_budget_is_what_weights_and_caches_may_take(tiny_model: Path, dtype: str):
    """The least budget that is accepted is what a run holds once all its pools are in use."""
    options = {"dtype": dtype, "ctx_size": 1500, "max_num_seqs": 4}
    llm = LLM(tiny_model, **options)
    strategy = Autoregressive(llm.transformer, llm.model.numerics)
    states = [strategy.empty_state(pool) for pool in llm.engine.buckets.pools]
    assert len(states) > 1
    caches = [leaf.nbytes for state in states for leaf in jax.tree.leaves(state.caches)]
    held = resident_bytes(llm.model.params) + sum(caches)
    LLM(tiny_model, memory=held, **options)
    with pytest.raises(CapacityError, match=r"memory is .* MB \(raise --memory, or lower --ctx-size"):
        LLM(tiny_model, memory=held - 1, **options)


def test_a_budget_is_refused_where_it_would_not_hold(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "backend", lambda: "gpu")
    with pytest.raises(UnsupportedError, match="XLA_PYTHON_CLIENT_MEM_FRACTION"):
        LLM(tiny_model, memory=1 << 40)
