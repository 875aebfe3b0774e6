"""Laws of the engine: streamed = whole, nothing compiles after warm-up, and ends (bits: test_batching.py)."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import count_compilations
from tiny import VOCAB

from realm_jax import LLM, RequestError, SamplingParams
from realm_jax.programs import Programs
from realm_jax.serving.request import FinishReason, GenerationOutput, Request
from realm_jax.serving.runner import Runner

pytestmark = pytest.mark.unoptimized
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, max_num_seqs=16)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(length)]


def mixed_requests(seed: int, count: int = 16) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of one to three chunks; greedy, sampled, penalized and biased requests side by side."""
    rng = random.Random(seed)
    prompts = [random_prompt(rng, rng.choice([1, 5, 31, 40, 200, 255, 256, 300, 600])) for _ in range(count)]
    kinds = [
        GREEDY,
        replace(GREEDY, temperature=0.8, top_p=0.95, seed=3),
        replace(GREEDY, temperature=1.0, seed=4),
        replace(GREEDY, temperature=0.7, top_k=5, min_p=0.02, seed=5, logprobs=None),
        replace(GREEDY, temperature=1.2, repetition_penalty=1.3, presence_penalty=0.4, seed=6),
        replace(GREEDY, logit_bias={7: 4.0, 9: -5.0}, frequency_penalty=0.5, min_tokens=3, seed=7),
    ]
    return prompts, [replace(kinds[i % len(kinds)], max_tokens=rng.randint(1, 20)) for i in range(count)]


def said(output: GenerationOutput) -> tuple:
    """All that must not depend on the neighbours."""
    return output.token_ids, output.logprobs, output.text, output.finish_reason


def test_nothing_compiles_after_warmup(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=16)
    assert llm.engine.warmup() == len(llm.engine.buckets.programs()) <= 24
    assert set(llm.engine.programs) == set(llm.engine.buckets.programs())
    prompts, params = mixed_requests(4, count=24)
    with count_compilations() as compiled:
        llm.generate(prompts, params)
        llm.generate([random_prompt(random.Random(5), 250)], replace(GREEDY, max_tokens=20))
        list(llm.stream("hello", replace(GREEDY, n=3, temperature=1.0)))
    assert not compiled
    assert set(llm.engine.programs) == set(llm.engine.buckets.programs())


def test_the_compilation_counter_counts(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=7)
    llm.engine._runner._source = Programs()  # without a folder: each program is compiled
    with count_compilations() as compiled:
        llm.generate([[5] * 7], replace(GREEDY, max_tokens=2))
    assert len(compiled) >= 2


def test_warmup_changes_no_answer(tiny_model: Path, llm: LLM) -> None:
    warm = LLM(tiny_model, max_num_seqs=16, ctx_size=1024)
    warm.engine.warmup()
    prompts, params = mixed_requests(6, count=6)
    assert [said(o) for o in warm.generate(prompts, params)] == [
        said(o) for o in llm.generate(prompts, params)
    ]


def test_streamed_is_whole(llm: LLM) -> None:
    params = replace(GREEDY, temperature=1.0, seed=11, n=2, max_tokens=40)
    whole = llm.generate("a stream", params)
    deltas = list(llm.stream("a stream", params))
    for sample, output in enumerate(whole):
        mine = [delta for delta in deltas if delta.sample_index == sample]
        assert "".join(delta.text for delta in mine) == output.text
        assert [token for delta in mine for token in delta.token_ids] == output.token_ids
        assert mine[-1].output is not None and said(mine[-1].output) == said(output)
        assert all(delta.output is None for delta in mine[:-1])


def test_interleaved_streams_lose_nothing(llm: LLM) -> None:
    params = replace(GREEDY, max_tokens=9)
    first, second = llm.stream("one", params), llm.stream("two", replace(params, max_tokens=15))
    texts = ["", ""]
    for _ in range(30):
        for i, stream in enumerate((first, second)):
            if (delta := next(stream, None)) is not None:
                texts[i] += delta.text
    assert texts == [
        llm.generate("one", params)[0].text,
        llm.generate("two", replace(params, max_tokens=15))[0].text,
    ]


def test_samples_are_independent_and_reproducible(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=5, n=4, ignore_eos=True)
    outputs = llm.generate("many", params)
    assert [o.sample_index for o in outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    assert [said(o) for o in llm.generate("many", params)] == [said(o) for o in outputs]
    assert said(llm.generate("many", replace(params, n=1))[0]) == said(outputs[0])


def test_a_sequence_that_outgrows_its_slot_says_the_same(tiny_model: Path) -> None:
    """Prompts just below a pool's capacity move up while they run; logits of the whole text agree."""
    llm = LLM(tiny_model, dtype="float32", max_num_seqs=4, max_num_batched_tokens=256)
    for length in (250, 255, 1020):
        prompt = random_prompt(random.Random(length), length)
        output = llm.generate([prompt], replace(GREEDY, max_tokens=16))[0]
        logits = llm.logits([*prompt, *output.token_ids])
        best = logits[length - 1 : -1].argmax(-1).tolist()
        assert output.token_ids == best
        assert output.logprobs is not None
        shifted = logits[length - 1 : -1].astype(np.float64)
        expected = shifted.max(-1) - np.log(np.exp(shifted).sum(-1))
        np.testing.assert_allclose([p["logprob"] for p in output.logprobs], expected, atol=1e-4)


def test_ends(llm: LLM) -> None:
    free = replace(GREEDY, max_tokens=30)
    plain = llm.generate("where to stop", free)[0]
    assert plain.finish_reason is FinishReason.LENGTH and len(plain.token_ids) == 30
    token = plain.token_ids[6]
    first = plain.token_ids.index(token)
    by_token = llm.generate("where to stop", replace(free, stop_token_ids=[token]))[0]
    assert by_token.finish_reason is FinishReason.STOP
    assert by_token.token_ids == plain.token_ids[: first + 1]
    assert plain.text.startswith(by_token.text)
    text = plain.text[5:8]
    by_text = llm.generate("where to stop", replace(free, stop=text))[0]
    assert by_text.finish_reason is FinishReason.STOP
    assert by_text.text == plain.text[: plain.text.index(text)]
    last = llm.generate("where to stop", replace(free, max_tokens=first + 1, stop_token_ids=[token]))[0]
    assert last.finish_reason is FinishReason.STOP


def test_min_tokens_masks_the_end(llm: LLM) -> None:
    biased = SamplingParams(temperature=0, max_tokens=10, logit_bias={2: 100.0})
    assert llm.generate("end", biased)[0].token_ids == [2]
    output = llm.generate("end", replace(biased, min_tokens=4))[0]
    assert output.token_ids[4:] == [2] and 2 not in output.token_ids[:4]
    ignored = llm.generate("end", replace(biased, ignore_eos=True))[0]
    assert ignored.token_ids == [2] * 10 and ignored.finish_reason is FinishReason.LENGTH


def test_the_context_ends_a_sequence(tiny_model: Path) -> None:
    llm = LLM(tiny_model, ctx_size=1000)
    output = llm.generate([[5] * 995], replace(GREEDY, max_tokens=None))[0]
    assert output.finish_reason is FinishReason.LENGTH and len(output.token_ids) == 5
    with pytest.raises(RequestError, match=r"prompt is 1,000 tokens; the context is 1,000"):
        llm.generate([[5] * 1000])


def test_abort_frees_the_slots(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=4)
    expected = llm.generate("after", GREEDY)[0]
    for length in (3, 300):
        for steps in range(4):
            stream = llm.stream([7] * length, replace(GREEDY, n=6, max_tokens=None))
            for _ in range(steps):
                next(stream)
            stream.close()  # pyright: ignore[reportAttributeAccessIssue]: a generator
    assert not llm.engine.scheduler.has_work
    assert said(llm.generate("after", GREEDY)[0]) == said(expected)


def test_more_requests_than_slots(tiny_model: Path, llm: LLM) -> None:
    few = LLM(tiny_model, max_num_seqs=4)
    prompts, params = mixed_requests(8, count=14)
    assert [said(o) for o in few.generate(prompts, params)] == [
        said(o) for o in llm.generate(prompts, params)
    ]


def test_wrong_requests_harm_nobody(llm: LLM) -> None:
    for prompts, params, message in (
        ([[]], GREEDY, "prompt is empty"),
        ([[VOCAB]], GREEDY, f"token id {VOCAB}"),
        ([[-1]], GREEDY, "token id -1"),
        ([[True]], GREEDY, "token ids are whole numbers"),
        (["a"], replace(GREEDY, logit_bias={VOCAB: 1.0}), "logit_bias"),
        (["a", "b"], [GREEDY], "1 entries for 2 prompts"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate(prompts, params)
    with pytest.raises(RequestError, match="token id"):
        llm.generate([[5, 6], [VOCAB]], GREEDY)  # the good one before it is aborted
    assert not llm.engine.scheduler.has_work
    request = Request("same", (5, 6), GREEDY, seed=1)
    llm.engine.add_request(request)
    with pytest.raises(RequestError, match="in use"):
        llm.engine.add_request(request)
    llm.engine.abort("same")


def test_chat(llm: LLM) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    output = llm.chat(messages, GREEDY)
    text = "system: be brief\nuser: hi\nassistant: "
    ids = llm.tokenizer.encode(text, add_special=False, parse_special=True)
    assert output.prompt_token_ids == [llm.tokenizer.bos_id, *ids]
    assert said(llm.generate([output.prompt_token_ids], GREEDY)[0]) == said(output)


@pytest.mark.parametrize("before", [True, False])
def test_a_failed_step_harms_no_later_request(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Whatever a step raises, before or after it took the state: others end as aborted, new ones run."""
    llm = LLM(tiny_model, max_num_seqs=4, ctx_size=1024)
    expected = said(llm.generate("after", GREEDY)[0])
    other = llm.stream("other", GREEDY)
    next(other)
    real = Runner._call

    def failing(self: Runner, name: str, *arguments: Any) -> object:
        result = real(self, name, *arguments) if not before or name.startswith("prefill") else None
        if name.startswith("decode"):
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_call", failing)
        with pytest.raises(KeyboardInterrupt):
            llm.generate("failing", GREEDY)
    assert list(other)[-1].output.finish_reason is FinishReason.ABORT  # pyright: ignore[reportOptionalMemberAccess]
    assert said(llm.generate("after", GREEDY)[0]) == expected
    assert llm.engine.warmup() > 0


def test_max_num_seqs_is_kept(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=2)
    for i in range(5):
        llm.engine.add_request(Request(f"{i}", (5,) * (100 * i + 1), GREEDY, seed=i))
    while llm.engine.has_work:
        llm.engine.step()
        assert len(list(llm.engine.scheduler.slots.taken())) <= 2
