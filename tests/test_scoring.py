"""Scores are the forward pass's log-probabilities; shared contexts change no bit."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tiny import VOCAB

from realm_jax import LLM, RequestError
from realm_jax.perplexity import perplexities

rng = random.Random(0)


def ids_of(length: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(length)]


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, dtype="float32")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("length", [2, 33, 256, 257, 700])
def test_a_prompts_score_is_its_forward_pass(llm: LLM, length: int) -> None:
    prompt = ids_of(length)
    score = llm.score([prompt])[0]
    expected = log_softmax(llm.logits(prompt))[np.arange(length - 1), prompt[1:]]
    assert score.token_ids == prompt and score.logprobs[0] is None
    np.testing.assert_allclose(np.array(score.logprobs[1:], float), expected, atol=1e-5)
    assert score.total == pytest.approx(expected.sum(), abs=1e-3)


def test_a_shared_context_changes_no_bit(llm: LLM) -> None:
    contexts = [ids_of(n) for n in (1, 40, 256, 257, 600)]
    pairs = [(context, ids_of(n)) for context in contexts for n in (1, 5, 300)]
    together = llm.score([c for c, _ in pairs], [c for _, c in pairs])
    for (context, continuation), shared in zip(pairs, together, strict=True):
        alone = llm.score([context], [continuation])[0]
        whole = llm.score([[*context, *continuation]])[0]
        assert shared == alone
        assert shared.token_ids == continuation
        assert shared.logprobs == whole.logprobs[len(context) :]


def test_is_greedy(llm: LLM) -> None:
    prompt = ids_of(20)
    best = int(llm.logits(prompt)[-1].argmax())
    assert llm.score([prompt], [[best]])[0].is_greedy
    assert not llm.score([prompt], [[(best + 1) % VOCAB]])[0].is_greedy


def test_text_continues_text(llm: LLM) -> None:
    score = llm.score(["a b c"], [" d e"])[0]
    whole, context = llm.tokenizer.encode("a b c d e"), llm.tokenizer.encode("a b c")
    assert score.token_ids == whole[len(context) :]


def test_generated_logprobs_are_scores(llm: LLM) -> None:
    from realm_jax import SamplingParams

    prompt = ids_of(30)
    output = llm.generate([prompt], SamplingParams(max_tokens=20, seed=1, logprobs=0, ignore_eos=True))[0]
    assert output.logprobs is not None
    score = llm.score([prompt], [output.token_ids])[0]
    np.testing.assert_allclose(
        [p["logprob"] for p in output.logprobs], np.array(score.logprobs, float), atol=1e-4
    )


def test_wrong_scores(llm: LLM) -> None:
    for prompts, continuations, message in (
        ([[]], None, "no context"),
        ([[]], [[5]], "no context"),
        ([[5] * 3000], None, "the context is 2,048"),
        ([[5]], [[VOCAB]], "token id"),
        ([[5]], [], "0 entries for 1"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.score(prompts, continuations)
    with pytest.raises(RequestError, match="one window is 512"):
        next(perplexities(llm, [5] * 500, window=512))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 5e-3)])
def test_perplexity_is_llama_cpps(fixtures: Path, default_model: Path, dtype: str, bound: float) -> None:
    golden = json.loads((fixtures / "smollm2" / "perplexity.json").read_text())
    expected = golden["models"]["Q4_1-dequant-f32"]["running_ppl_after_chunk"]
    llm = LLM(default_model, dtype=dtype, ctx_size=512)
    ids = llm.tokenizer.encode((fixtures / "smollm2" / "gpl-3.txt").read_text())
    windows = len(expected) if dtype == "float32" else 6
    running = list(perplexities(llm, ids[: windows * 512], window=512))
    np.testing.assert_allclose(running, expected[:windows], rtol=bound)
