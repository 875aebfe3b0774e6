"""RealmLM: lm_eval's requests are answered as `LLM.score` and `LLM.generate` do, token for token."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from tiny import TEMPLATE, write_model

from realm_jax import LLM, RequestError, SamplingParams
from realm_jax.evaluation import RealmLM, sampling_params

pytestmark = pytest.mark.unoptimized

CONTEXT = 256
BRIEF = "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}>"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tiny llama whose template begins with BOS; it has others by name, too."""
    path = tmp_path_factory.mktemp("model") / "tiny-eval.gguf"
    loud = "{{ messages[0]['content'] | upper }}"
    named = {"tokenizer.chat_template.brief": BRIEF, "tokenizer.chat_template.loud": loud}
    write_model(path, template="{{ bos_token }}" + TEMPLATE, metadata=named)
    return LLM(path, dtype="float32", ctx_size=CONTEXT, max_num_seqs=32)  # the shapes of test_evaluation.py


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What lm_eval's logger says; it hands nothing on once it is set up."""
    logger = logging.getLogger("lm_eval.realm")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def requests(kind: Any, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def ids_of(llm: LLM, text: str) -> list[int]:
    return llm.tokenizer.encode(text, add_special=False)


def test_conversations(llm: LLM) -> None:
    lm = RealmLM(llm)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the answer is "}]
    ids = lm.tok_encode(lm.apply_chat_template(messages))
    assert ids == llm.chat_prompt(messages)
    assert ids.count(1) == 1
    assert lm.apply_chat_template(messages, add_generation_prompt=False).endswith("assistant: the answer is ")
    before = lm.tokenizer_name
    assert lm.chat_template("brief") == BRIEF
    assert lm.apply_chat_template(messages) == "hellothe answer is>"
    assert lm.apply_chat_template(messages, add_generation_prompt=False) == "hellothe answer is"
    assert before != lm.tokenizer_name
    lm.chat_template("loud")
    with pytest.raises(RequestError, match="cannot be continued: 'the answer is '"):
        lm.apply_chat_template(messages, add_generation_prompt=False)
    with pytest.raises(RequestError, match=r"'formal'.*brief"):
        lm.chat_template("formal")


def test_a_template_without_system_messages(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    lm = RealmLM(LLM(write_model(tmp_path / "refusing.gguf", template=refusal + TEMPLATE)))
    system, user = {"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}
    assert lm.apply_chat_template([system, user]) == lm.apply_chat_template([user])
    assert "no system" in log.text
    with pytest.raises(RequestError, match="refuses"):
        lm.apply_chat_template([system])


def test_loglikelihood_is_the_score_of_the_tokens(llm: LLM) -> None:
    lm = RealmLM(llm)
    pairs = [("the cat", " sat"), ("the cat ", "sat"), ("", "cat"), ("a b c", " d e f"), ("the cat", " ran")]
    found = lm.loglikelihood(requests("loglikelihood", *pairs))
    expected = [
        ([1, *ids_of(llm, "the cat")], ids_of(llm, "the cat sat")[6:]),
        ([1, *ids_of(llm, "the cat")], ids_of(llm, "the cat sat")[6:]),
        ([1], ids_of(llm, "cat")),
        ([1, *ids_of(llm, "a b c")], ids_of(llm, "a b c d e f")[3:]),
        ([1, *ids_of(llm, "the cat")], ids_of(llm, "the cat ran")[6:]),
    ]
    scores = [llm.score([context], [continuation])[0] for context, continuation in expected]
    assert found == [(score.total, score.is_greedy) for score in scores]
    (greedy,) = llm.generate(["the cat"], SamplingParams(temperature=0, max_tokens=1))
    context = [1, *ids_of(llm, "the cat")]
    assert lm._loglikelihood_tokens([(None, context, greedy.token_ids)])[0][1] is True


def test_long_contexts_are_cut_from_the_left(llm: LLM, log: pytest.LogCaptureFixture) -> None:
    lm = RealmLM(llm)
    text = " ".join(random.Random(0).choices("abcdefgh", k=2 * CONTEXT))
    (found,) = lm.loglikelihood(requests("loglikelihood", (text, " x y")))
    kept = ids_of(llm, text)[-(CONTEXT - 2) :]
    score = llm.score([kept], [ids_of(llm, "a x y")[1:]])[0]
    assert found == (score.total, score.is_greedy)
    assert f"1 of 1 requests did not fit the context of {CONTEXT} tokens" in log.text

    (answer,) = lm.generate_until(
        requests("generate_until", (text, {"max_gen_toks": 10, "until": ["", "x"]}))
    )
    params = SamplingParams(temperature=0, max_tokens=10, stop="x")
    assert answer == llm.generate([ids_of(llm, text)[-(CONTEXT - 10) :]], params)[0].text


@pytest.mark.parametrize("length", [1, CONTEXT - 1, CONTEXT, 3 * (CONTEXT - 1), 600])
def test_rolling_scores_every_token_once(llm: LLM, length: int) -> None:
    words = random.Random(length).choices("abcdefgh", k=length)
    (found,) = RealmLM(llm).loglikelihood_rolling(requests("loglikelihood_rolling", (" ".join(words),)))
    ids = [1, *ids_of(llm, " ".join(words))]
    assert len(ids) == length + 1
    total, scored = 0.0, 1
    while scored < len(ids):  # windows as full as can be: a first token that is given, the others scored
        end = min(scored + CONTEXT - 1, len(ids))
        window = ids[max(end - CONTEXT, 0) : end]
        logprobs = llm.score([window])[0].logprobs[-(end - scored) :]
        total += sum(p for p in logprobs if p is not None)
        scored = end
    assert found == pytest.approx(total, rel=1e-6)


def test_several_texts_keep_their_order(llm: LLM) -> None:
    texts = ["a b c", "", "d e " * 200, "f"]
    lm = RealmLM(llm)
    together = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    alone = [lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))[0] for text in texts]
    assert together == alone and together[1] == 0.0


def test_generation_arguments() -> None:
    greedy: list[tuple[dict, dict[str, Any]]] = [
        ({}, {"max_tokens": 256}),
        ({"until": "\n", "temperature": 0.0, "num_beams": 1}, {"max_tokens": 256, "stop": "\n"}),
        ({"until": ["a", ""], "do_sample": False, "temperature": 0.7}, {"max_tokens": 256, "stop": "a"}),
        ({"max_new_tokens": 5, "do_sample": True}, {"max_tokens": 5}),
    ]
    for given, expected in greedy:
        assert sampling_params(given) == SamplingParams(temperature=0, **expected)
    given = {"temperature": 0.7, "top_p": 0.9, "seed": 3, "max_gen_toks": 5}
    expected = SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=5)
    assert sampling_params(given) == expected


def test_sampling_repeats_with_lm_evals_seed() -> None:
    drawn = []
    for seed in (5, 5, 6):
        random.seed(seed)
        drawn.append([sampling_params({"do_sample": True, "temperature": 1}).seed for _ in range(2)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 2


def test_wrong_requests(llm: LLM) -> None:
    lm = RealmLM(llm)
    for arguments, message in (
        (("a", {"max_gen_toks": CONTEXT}), f"max_gen_toks is {CONTEXT}; the context is {CONTEXT}"),
        (("a", {"diversity_penalty": 1.0}), "diversity_penalty is unknown"),
        (("a", {"do_sample": "no"}), "do_sample is 'no'"),
    ):
        with pytest.raises(RequestError, match=message):
            lm.generate_until(requests("generate_until", arguments))
    for pair, message in (
        (("a", "b" * CONTEXT), f"a continuation is {CONTEXT} tokens; the context is {CONTEXT}"),
        (("a b", ""), "adds no token"),
    ):
        with pytest.raises(RequestError, match=message):
            lm.loglikelihood(requests("loglikelihood", pair))
