"""Gemma 4: layers of different sizes, shared keys and values, inputs of each layer, experts beside.

llama.cpp's logits are compared in `test_variants`, coarsely, because it rounds this activation to 16 bits.
"""

import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_batching import bits
from test_engine import mixed_requests, random_prompt
from test_lora_applied import random_adapter
from variants import prompt, write_variant

from realm_jax import LLM, SamplingParams, gguf, inspection
from realm_jax.config import EngineConfig
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.loading import load_model
from realm_jax.lora.export import write_gguf
from realm_jax.model import Transformer
from realm_jax.parallel import Division
from realm_jax.quantization.observed import observe
from realm_jax.research import forward

NAMES = ("gemma4", "gemma4-experts")
GOLDEN = np.load(Path(__file__).parent / "golden" / "gemma4.npz")
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "ctx_size": 256}


@pytest.fixture(scope="module", params=NAMES)
def llm(request: pytest.FixtureRequest, fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_variant(fixtures, request.param, tmp_path_factory.mktemp("gemma4") / f"{request.param}.gguf")
    return LLM(path, dtype="float32", **SMALL)


def test_logits_are_those_of_transformers(llm: LLM, fixtures: Path) -> None:
    name = llm.model.path.stem
    found = llm.logits(prompt(fixtures, name))[[15, 31, 47]]
    assert np.abs(found - GOLDEN[name]).max() < 2e-5


def test_greedy_tokens_are_those_of_transformers(llm: LLM, fixtures: Path) -> None:
    name = llm.model.path.stem
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (output,) = llm.generate([prompt(fixtures, name)], params)
    assert output.token_ids == GOLDEN[f"{name}-greedy"].tolist()


def test_batched_is_alone(llm: LLM) -> None:
    """Prompts longer than the window and than a call, all in slots of their own."""
    rng = random.Random(0)
    _, params = mixed_requests(1, 6)
    prompts = [random_prompt(rng, length) for length in (1, 7, 8, 9, 65, 150)]
    together = llm.generate(prompts, params)
    assert [bits(each) for each in together] == [
        bits(llm.generate([p], q)[0]) for p, q in zip(prompts, params, strict=True)
    ]


def test_one_pass_without_slots_says_the_same(llm: LLM, fixtures: Path) -> None:
    """What research and training compute with: whole sequences, a plain formula for attention."""
    tokens = prompt(fixtures, llm.model.path.stem)
    found = forward(llm.transformer, llm.model.params, np.array([tokens]), capture=["layers.3.attention.*"])
    assert np.abs(found.logits[0] - llm.logits(tokens)).max() < 1e-4
    writes = "layers.3.attention.k" in found.activations
    assert writes == (llm.model.config.layers[3].keys_of is None)


def test_an_adapter_named_by_a_request_is_the_folded_one(llm: LLM, tmp_path: Path, fixtures: Path) -> None:
    adapter, file = random_adapter(llm, 1, 4), tmp_path / "a.gguf"
    write_gguf(adapter, llm.model.base, file)
    tokens = prompt(fixtures, llm.model.path.stem)
    folded = LLM(llm.model.path, dtype="float32", fold=[file], **SMALL).logits(tokens)
    llm.load_adapter("a", file)
    named, plain = llm.logits(tokens, lora="a"), llm.logits(tokens)
    assert np.abs(named - folded).max() < 1e-3 < np.abs(named - plain).max()
    llm.unload_adapter("a")


def test_planned_memory_is_what_weights_and_caches_take(llm: LLM) -> None:
    with gguf.open(llm.model.path) as file:
        planned = inspection.describe(file)["memory_bytes"]["float32"]
    model = load_model(llm.model.path, EngineConfig(dtype="float32"))
    caches = Transformer(model.config).empty_caches(1, 1024, inspection.NUMERICS["float32"])
    assert planned["cache_per_1024_tokens"] == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert planned["weights"] == sum({id(x): x.nbytes for x in jax.tree.leaves(model.params)}.values())


def test_tensors_that_nothing_reads_may_be_missing(fixtures: Path, tmp_path: Path) -> None:
    """Keys and values of layers that read an earlier one's; those of others may not, nor what turns them."""
    with gguf.open(write_variant(fixtures, "gemma4", tmp_path / "model.gguf")) as file:
        unread = [f"blk.{i}.{name}.weight" for i in (2, 3) for name in ("attn_k", "attn_v", "attn_k_norm")]
        for name in unread:
            del file.tensors[name]
        inspection.describe(file)
        for name in ("blk.1.attn_k.weight", "rope_freqs.weight"):
            kept = file.tensors.pop(name)
            with pytest.raises(ModelFileError, match=f"{name} is missing"):
                inspection.describe(file)
            file.tensors[name] = kept


def test_an_importance_matrix_sees_every_projection(llm: LLM, fixtures: Path) -> None:
    tokens = (prompt(fixtures, llm.model.path.stem) * 2)[:64]
    squares = observe(llm.transformer, llm.model.params, llm.model.numerics, [tokens])
    layers = {name for name in squares if name.startswith("blk.")}
    wanted = {f"blk.3.{name}.weight" for name in ("attn_q", "attn_output", "ffn_gate", "ffn_down")}
    assert layers >= wanted and layers == set(squares)


def test_layers_of_different_sizes_are_divided_over_no_mesh(llm: LLM) -> None:
    with pytest.raises(UnsupportedError, match="'tp=2', but gemma4 has layers of different sizes"):
        Division(llm.model.config, 2)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attention.shared_kv_layers", 4, "before those is no layer with the window of layer 0"),
        ("attention.shared_kv_layers", 5, "shared_kv_layers is 5; it must be from 0 to 4"),
        ("attention.sliding_window", None, "attention.sliding_window is missing"),
        ("attention.sliding_window_pattern", None, "attention.sliding_window_pattern is missing"),
        ("attention.head_count_kv", np.array([1, 1, 1]), "a whole number for each of 4 layers"),
        ("attention.head_count_kv", np.array([1, 1, 0, 1]), "must have numbers from 1 to"),
        (
            "attention.head_count_kv",
            np.array([1, 1, 3, 4]),
            "is 4, no multiple of head_count_kv 3 of layer 2",
        ),
        ("feed_forward_length", np.array([96.0] * 4), "a whole number for each of 4 layers"),
        ("feed_forward_length", 96, r"blk.2.ffn_gate.weight is \[160, 64\], expected \[96, 64\]"),
        ("attention.key_length_swa", None, "attention.key_length_swa is missing"),
        ("attention.value_length_swa", 8, "value_length_swa differs from key_length_swa 16"),
        ("rope.dimension_count_swa", 32, "rope.dimension_count_swa is 32; it must be from 1 to 16"),
        ("rope.dimension_count_swa", 15, "rope.dimension_count_swa is 15; it must be even"),
        ("embedding_length_per_layer_input", 9, r"per_layer_token_embd.weight is \[320, 32\], expected"),
    ],
)
def test_wrong_facts_are_named(fixtures: Path, tmp_path: Path, key: str, value: Any, words: str) -> None:
    path = write_variant(fixtures, "gemma4", tmp_path / "model.gguf")
    with gguf.open(path) as file:
        file.metadata[f"gemma4.{key}"] = value
        if value is None:
            del file.metadata[f"gemma4.{key}"]
        with pytest.raises((ModelFileError, UnsupportedError), match=words):
            inspection.describe(file)
