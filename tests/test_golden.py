"""Logits and greedy continuations equal llama.cpp's, for every architecture and the real models."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES

from realm_jax import LLM, SamplingParams, gguf
from realm_jax.architectures import ARCHITECTURES
from realm_jax.kernels import native

USES_GELU = ("gemma", "gemma2", "gemma3", "gpt2", "starcoder2", "falcon")
CONTEXTS = {"gpt2": 128}  # that of its positions
WITHOUT_A_CASE = {"granitemoe"}  # granite and llama-moe in one
WITHOUT_A_CASE |= {"qwen3next", "qwen35", "qwen35moe"}  # test_hybrid.py
WITHOUT_A_CASE |= {"gemma4"}  # test_gemma4.py
STORIES = ("F16", "IQ4_NL", "Q4_0", "Q4_K_M", "Q8_0")
SMOLLM2 = "smollm2/expected-Q4_1-dequant-f32"


def greedy(llm: LLM, prompt: np.ndarray, count: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return llm.generate([prompt.tolist()], params)[0].token_ids


def clear_length(margins: np.ndarray, least: float = 0.02) -> int:
    """Tokens before the first near-tie."""
    ties = np.flatnonzero(margins < least)
    return int(ties[0]) if len(ties) else len(margins)


def cases() -> list[str]:
    folder = FIXTURES / "arch"
    return sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []


def test_every_supported_architecture_has_a_case(fixtures: Path) -> None:
    names = {
        str(gguf.open(fixtures / "arch" / case / "model.gguf").metadata["general.architecture"])
        for case in cases()
    }
    assert names | WITHOUT_A_CASE == set(ARCHITECTURES)


def arch(fixtures: Path, case: str) -> tuple[LLM, dict[str, np.ndarray]]:
    folder = fixtures / "arch" / case
    llm = LLM(folder / "model.gguf", dtype="float32", ctx_size=CONTEXTS.get(case, 256))
    return llm, dict(np.load(folder / "expected.npz"))


@pytest.mark.parametrize("case", cases())
def test_logits_of_architecture(fixtures: Path, case: str) -> None:
    llm, expected = arch(fixtures, case)
    golden = expected["logits_dequant" if "logits_dequant" in expected else "logits"]
    difference = np.abs(llm.logits(expected["tokens"].tolist()) - golden).max()
    assert difference < (5e-3 if case in USES_GELU else 1e-4)


@pytest.mark.parametrize("case", cases())
@pytest.mark.unoptimized  # the best token is ahead by 0.03 and more
def test_greedy_tokens_of_architecture(fixtures: Path, case: str) -> None:
    llm, expected = arch(fixtures, case)
    assert greedy(llm, expected["tokens"], 16) == expected["greedy"].tolist()


def test_stories(fixtures: Path) -> None:
    folder = fixtures / "stories260K"
    expected = np.load(folder / "expected.npz")
    llm = LLM(folder / "model.gguf", dtype="float32", ctx_size=512)
    for name in ("", "random_"):
        tokens, golden = expected[f"{name}tokens"], expected[f"{name}logits"]
        assert np.abs(llm.logits(tokens.tolist()) - golden).max() < 1e-3
    assert greedy(llm, expected["tokens"][:48], 64) == expected["greedy"].tolist()
    story = expected["story_from_bos"]
    assert greedy(llm, np.array([1]), len(story)) == story.tolist()


@pytest.mark.parametrize("kind", STORIES)
def test_quantized_stories(fixtures: Path, kind: str) -> None:
    folder = fixtures / "stories260K"
    expected = np.load(folder / f"expected-{kind}.npz")
    llm = LLM(folder / f"model-{kind}.gguf", dtype="float32", ctx_size=512)
    logits = llm.logits(expected["tokens"].tolist())
    assert np.abs(logits - expected["logits_dequant"]).max() < 1e-3


@pytest.fixture(scope="module")
def smollm2(default_model: Path) -> LLM:
    return LLM(default_model, dtype="float32", ctx_size=512)


@pytest.mark.slow
def test_smollm2_logits(fixtures: Path, smollm2: LLM) -> None:
    expected = np.load(fixtures / f"{SMOLLM2}.npz")
    for i in range(6):
        logits = smollm2.logits(expected[f"p{i}_tokens"].tolist())
        top = np.take_along_axis(logits, expected[f"p{i}_top_ids"], axis=1)
        assert np.abs(top - expected[f"p{i}_top_logits"]).max() < 5e-3
        last = expected[f"p{i}_last_logits"]  # float16: half a unit in the last place on top of the bound
        assert (np.abs(logits[-1] - last) <= 5e-3 + np.spacing(np.abs(last)).astype(np.float32) / 2).all()


@pytest.mark.slow
def test_smollm2_greedy(fixtures: Path, smollm2: LLM) -> None:
    expected = np.load(fixtures / f"{SMOLLM2}.npz")
    names = [f"p{i}" for i in range(6)] + ["chat_jinja", "chat_builtin"]
    params = SamplingParams(temperature=0, max_tokens=64)
    outputs = smollm2.generate([expected[f"{name}_tokens"].tolist() for name in names], params)
    for name, output in zip(names, outputs, strict=True):
        length = clear_length(expected[f"{name}_greedy_margin"])
        assert output.token_ids[:length] == expected[f"{name}_greedy"][:length].tolist(), name
        if length == len(expected[f"{name}_greedy"]) and length < 64:
            assert output.finish_reason == "stop", name


@pytest.mark.slow
def test_smollm2_answers_the_bare_question(fixtures: Path, smollm2: LLM) -> None:
    expected = np.load(fixtures / f"{SMOLLM2}.npz")
    chat = json.loads((fixtures / f"{SMOLLM2}.json").read_text())["chat"]
    output = smollm2.chat(chat["messages"], SamplingParams(temperature=0))
    assert output.prompt_token_ids == expected["chat_jinja_tokens"].tolist()
    assert output.token_ids == expected["chat_jinja_greedy"].tolist()
    assert "Paris" in output.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernels", "least_agreement", "most_divergence"),
    # the C++ kernels round activations to int8 for each 32 inputs, as llama.cpp does
    [("xla", 0.97, 0.002), ("native", 0.95, 0.005)],
)
def test_smollm2_in_bfloat16_is_close_to_float32(
    fixtures: Path,
    smollm2: LLM,
    default_model: Path,
    kernels: str,
    least_agreement: float,
    most_divergence: float,
) -> None:
    if kernels == "native" and (problem := native.problem()):
        pytest.skip(f"no C++ kernels: {problem}")
    expected = np.load(fixtures / f"{SMOLLM2}.npz")
    rounded = LLM(default_model, dtype="bfloat16", kernels=kernels, ctx_size=512)
    text = (fixtures / "smollm2" / "gpl-3.txt").read_text()[:1500]
    prompts = [expected[f"p{i}_tokens"].tolist() for i in range(6)] + [smollm2.tokenizer.encode(text)]
    agree, divergence = [], []
    for prompt in prompts:
        p, q = log_softmax(smollm2.logits(prompt)), log_softmax(rounded.logits(prompt))
        agree.append(p.argmax(-1) == q.argmax(-1))
        divergence.append((np.exp(p) * (p - q)).sum(-1))
    assert np.concatenate(agree).mean() >= least_agreement
    assert np.concatenate(divergence).mean() < most_divergence


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
