"""Models on the GPU and TPU kernels, interpreted: weights are words, the text is that of plain formulas."""

from pathlib import Path
from typing import Any

import gguf as gguf_py
import jax
import numpy as np
import pytest
from native_cases import normal
from test_lora_applied import random_adapter
from tiny import VOCAB, write_model

from realm_jax import LLM, SamplingParams, quant
from realm_jax.config import Numerics
from realm_jax.experts import GroupedExperts
from realm_jax.ggml import GGMLType
from realm_jax.kernels.words import dequantize_words
from realm_jax.lora.export import write_gguf
from realm_jax.nodes import Dense, Kernel, Stacked, Words
from realm_jax.projections import Stored, planned_bytes, projection
from realm_jax.quant.int8 import quantize_q8_0

TYPES = gguf_py.GGMLQuantizationType
KINDS: dict[str, TYPES] = {}
KINDS |= dict.fromkeys(("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "token_embd"), TYPES.Q4_0)
KINDS |= dict.fromkeys(("attn_v", "ffn_down", "output"), TYPES.Q8_0)
IDS = np.random.default_rng(5).integers(3, VOCAB, 40).tolist()


def load(path: Path, **options: Any) -> LLM:
    return LLM(path, ctx_size=128, max_num_seqs=1, max_num_batched_tokens=64, dtype="float32", **options)


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("words") / "m.gguf", layers=1, kinds=KINDS)


def test_the_text_is_that_of_plain_formulas(quantized_model: Path):
    ours, plain = (load(quantized_model, kernels=kernels) for kernels in ("pallas", "reference"))
    params = ours.model.params
    qkv = params["layer_0"]["attention"]["qkv"]["kernel"]
    assert isinstance(qkv, Stacked) and all(isinstance(part, Words) for part in qkv.parts)
    assert isinstance(params["embedding"], Words) and isinstance(params["head"], Words)
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    found, wanted = (llm.generate([IDS], greedy)[0] for llm in (ours, plain))
    assert found.token_ids == wanted.token_ids and found.logprobs is not None and wanted.logprobs is not None
    for a, b in zip(found.logprobs, wanted.logprobs, strict=True):
        assert abs(a["logprob"] - b["logprob"]) < 1e-4


def test_an_adapter_applied_is_the_adapter_folded(quantized_model: Path, tmp_path: Path):
    llm = load(quantized_model, kernels="pallas")
    adapter = random_adapter(llm, 1, rank=5)
    write_gguf(adapter, llm.model.base, tmp_path / "a.gguf")
    llm.load_adapter("a", tmp_path / "a.gguf")
    wanted = load(quantized_model, kernels="pallas", fold=[(tmp_path / "a.gguf", -0.5)]).logits(IDS)
    assert np.abs(llm.logits(IDS, lora=[("a", -0.5)]) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(llm.logits(IDS) - wanted).max() > 0.1 * np.abs(wanted).max()


def test_experts_are_grouped_and_give_golden_logits(fixtures: Path):
    case = fixtures / "arch" / "llama-moe"
    expected = np.load(case / "expected.npz")
    llm = load(case / "model.gguf", kernels="pallas")
    assert isinstance(llm.model.params["layer_0"]["mlp"]["experts"], GroupedExperts)
    ids = expected["tokens"].tolist()[:64]
    assert np.abs(llm.logits(ids) - expected["logits"][: len(ids)]).max() < 1e-4


def stored(rng: np.random.Generator, kind: GGMLType, shape: tuple[int, int]) -> Stored:
    values = normal(rng, *shape)
    data = quantize_q8_0(values) if kind == GGMLType.Q8_0 else values.view(np.uint8)
    return Stored(data.reshape(-1), kind, shape)


def made(parts: list[Stored], weights: Any) -> Kernel:
    """The node, as large as planned."""
    numerics = Numerics("float32", "float32", weights, "pallas")
    node = projection(parts, numerics)
    assert planned_bytes(parts, numerics) == sum(leaf.nbytes for leaf in jax.tree.leaves(node))
    return node


def test_what_becomes_words():
    """Blocks, whatever their number of rows; with int8, plain numbers rounded as ggml's Q8_0."""
    rng = np.random.default_rng(6)
    blocks = [stored(rng, GGMLType.Q8_0, (rows, 96)) for rows in (3000, 21)]
    node = made(blocks, "quantized")
    assert isinstance(node, Words) and node.shape == (96, 3021)
    wanted = np.concatenate([part.values(0, part.shape[0]) for part in blocks])
    assert (np.asarray(jax.jit(dequantize_words, static_argnums=1)(node.words, node.form)) == wanted.T).all()

    numbers = stored(rng, GGMLType.F32, (21, 96))
    assert isinstance(made([numbers], "quantized"), Dense)
    node = made([numbers], "int8")
    rounded = quant.dequantize(quantize_q8_0(numbers.values(0, 21)).reshape(-1), GGMLType.Q8_0, (21, 96))
    assert isinstance(node, Words)
    assert (np.asarray(dequantize_words(node.words, node.form)) == rounded.T).all()
    assert isinstance(made([stored(rng, GGMLType.F32, (21, 40))], "int8"), Dense)  # 40 is no multiple of 32
