"""A whole model of mixed types on the C++ kernels against the plain formulas, and the laws of batches."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from native_cases import require_native
from test_engine import mixed_requests, random_prompt, said
from tiny import write_model

from realm_jax import LLM, gguf, weights
from realm_jax.architectures import read_config
from realm_jax.native_nodes import NativeDense, NativeQuantized, NativeScale
from realm_jax.nodes import Stacked
from realm_jax.quant import dequantize

require_native()

KINDS = {
    "attn_q": Kind.Q4_K,
    "attn_k": Kind.Q4_K,
    "attn_v": Kind.Q8_0,  # queries and keys in one node, values in another
    "attn_output": Kind.Q5_1,
    "ffn_gate": Kind.Q4_0,
    "ffn_up": Kind.Q4_0,
    "ffn_down": Kind.BF16,
    "token_embd": Kind.Q4_1,
    "output": Kind.Q8_0,
}


@pytest.fixture(scope="module")
def mixed_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs that do not fill tiles, heads of 40."""
    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    return write_model(path, width=256, heads=4, kv_heads=2, ffn=160, kinds=KINDS, seed=3)


@pytest.fixture(scope="module")
def llm(mixed_model: Path) -> LLM:
    return LLM(mixed_model, max_num_seqs=4, ctx_size=256)


def test_each_matrix_is_kept_as_in_the_file(llm: LLM):
    kinds = (Stacked, NativeDense, NativeQuantized, NativeScale)
    nodes = jax.tree.leaves(llm.model.params, is_leaf=lambda node: isinstance(node, kinds))
    assert {type(node) for node in nodes} >= set(kinds)
    for node in nodes:
        if isinstance(node, Stacked):
            assert [part.shape for part in node.parts] == [(256, 256 + 128), (256, 128)]


def test_logits_are_those_of_dense_float32_weights(mixed_model: Path, llm: LLM):
    """Inputs in int8 cost little more than in bf16; in float32, quantized weights cost nothing."""
    arithmetic = [("dense", "float32"), ("quantized", "float32"), ("dense", "bfloat16")]
    plain, exact, half = (LLM(mixed_model, kernels="xla", weights=w, dtype=d) for w, d in arithmetic)
    for length in (1, 7, 150):
        prompt = random_prompt(random.Random(length), length)
        wanted = plain.logits(prompt)
        np.testing.assert_allclose(exact.logits(prompt), wanted, atol=2e-4)
        size = np.linalg.norm(wanted - wanted.mean(axis=-1, keepdims=True))
        errors = [np.linalg.norm(each.logits(prompt) - wanted) / size for each in (half, llm)]
        assert errors[1] < min(0.05, 4 * errors[0])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_batched_is_alone(mixed_model: Path, kv_dtype: str):
    """Bit for bit: steps of one row and of four, prompts of one chunk and of several."""
    options: dict[str, Any] = {"kv_dtype": kv_dtype, "ctx_size": 256, "max_num_batched_tokens": 128}
    llm = LLM(mixed_model, max_num_seqs=4, prefix_caching=False, **options)
    prompts = [random_prompt(random.Random(i), length) for i, length in enumerate((200, 1, 31, 90))]
    params = [replace(each, max_tokens=3 + 3 * i) for i, each in enumerate(mixed_requests(5, 4)[1])]
    together = llm.generate(prompts, params)
    alone = [llm.generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    assert [said(output) for output in together] == [said(output) for output in alone]


def test_planned_bytes_are_resident(mixed_model: Path, llm: LLM):
    with gguf.open(mixed_model) as file:
        planned = weights.planned_bytes(file, read_config(file), llm.model.numerics)
    assert planned == weights.resident_bytes(llm.model.params)


def test_rows_of_the_embedding_are_exact(mixed_model: Path, llm: LLM):
    with gguf.open(mixed_model) as file:
        info = file.tensors["token_embd.weight"]
        wanted = dequantize(file.data(info.name), info.ggml_type, info.shape)
    ids = np.array([[0, 319], [17, 17]], np.int32)
    found = llm.model.params["embedding"].rows(jax.numpy.asarray(ids))
    np.testing.assert_array_equal(found, wanted[ids])
