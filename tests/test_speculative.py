"""Laws of speculation: whatever guesses, however much and beside whom, the output is plain decoding's."""

import random
from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import count_compilations
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batching import bits
from test_engine import GREEDY, mixed_requests, random_prompt
from tiny import write_model

from realm_jax import LLM, RequestError, SamplingParams, UnsupportedError
from realm_jax.buckets import Pool
from realm_jax.drafters import LONGEST, SHORTEST, continuation
from realm_jax.serving.drafting import Drafting, DraftRecord
from realm_jax.serving.request import FinishReason, GenerationOutput
from realm_jax.speculative import Speculative


class Reckless(Drafting):
    """Guesses at random how much to guess, whatever became of it before."""

    def __init__(self, most: int, *, is_free: bool) -> None:
        super().__init__(most, is_free=is_free)
        self._rng = random.Random(most)

    def lengths(
        self, pool: int, shape: Pool, records: Rows[DraftRecord], rooms: Rows[int]
    ) -> tuple[int, list[int]]:
        del pool
        spare, each = shape.rows[-1] - len(records), []
        for room in rooms:
            count = min(self._rng.choice((0, 1, 3, self._most)), max(room, 0), spare)
            each.append(count)
            spare -= count
        return shape.rows_for(len(records) + sum(each)), each


def speculating(path: Path, draft: Path | None = None, **options: Any) -> LLM:
    """A model that guesses recklessly: with a draft, or from its own text."""
    llm = LLM(path, draft_model=draft, spec_type="ngram" if draft is None else "draft", **options)
    assert llm.engine.scheduler.drafting is not None
    is_free = llm.engine.scheduler.drafting._is_free
    llm.engine.scheduler.drafting = Reckless(llm.engine_config.spec_tokens, is_free=is_free)
    return llm


@pytest.fixture(scope="module")
def drafts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    """Who guesses: a model that is always right, one that knows nothing, the text itself."""
    bad = write_model(tmp_path_factory.mktemp("draft") / "bad.gguf", layers=1, width=32, heads=2, seed=9)
    return {"same": tiny_model, "bad": bad, "ngram": None}


def repetitive(seed: int, count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Mixed requests that go on for longer, half of them with few words; some end at text or at tokens."""
    rng = random.Random(seed)
    prompts, params = mixed_requests(seed, count)
    for i in range(count):
        prompts[i] = prompts[i][:300]
        params[i] = replace(params[i], max_tokens=rng.randint(1, 40))
        if i % 2:
            params[i] = replace(params[i], logit_bias={10: 100, 11: 100, 12: 100})
        if i % 5 == 1:
            params[i] = replace(params[i], stop=(chr(ord("a") + i), "word1"), temperature=1.0, seed=i)
        if i % 5 == 3:
            params[i] = replace(params[i], stop_token_ids=tuple(range(3 * i, 3 * i + 30)))
    return prompts, params


@pytest.mark.parametrize(
    ("who", "options"),
    [
        ("same", {"dtype": "float32", "deterministic": True}),
        ("bad", {"dtype": "float32", "deterministic": True}),
        ("ngram", {"dtype": "float32", "ctx_size": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 8}),
        ("ngram", {"dtype": "bfloat16", "kernels": "xla", "spec_tokens": 3, "deterministic": True}),
        ("bad", {"kv_dtype": "int8", "spec_tokens": 15, "deterministic": True}),
    ],
    ids=str,
)
def test_speculative_is_plain(
    tiny_model: Path, drafts: dict[str, Path | None], who: str, options: dict[str, Any]
) -> None:
    """Tokens, text, ends and log-probabilities, to the last bit, in a batch of mixed requests."""
    options = {"max_num_seqs": 12} | options
    plain = LLM(tiny_model, **{name: value for name, value in options.items() if name != "spec_tokens"})
    prompts, params = repetitive(21, 20)
    llm = speculating(tiny_model, drafts[who], **options)
    outputs = llm.generate(prompts, params)
    assert [bits(o) for o in outputs] == [bits(o) for o in plain.generate(prompts, params)]
    accepted = sum(drafts_of(o).accepted for o in outputs)
    drafted = sum(drafts_of(o).drafted for o in outputs)
    assert drafted > 20
    if who == "same":  # of its guesses only those that came after the sequence's end are wrong
        assert accepted > 0.9 * drafted
    else:
        assert 0 < accepted < 0.9 * drafted or who == "bad"


@pytest.mark.slow
@pytest.mark.parametrize("which", [pytest.param("stories260K", marks=pytest.mark.unoptimized), "default"])
def test_trained_models_say_what_they_say_alone(which: str, fixtures: Path, request: Any) -> None:
    """Greedy and sampled, many prompts at once, guessed from their own texts, which repeat themselves."""
    path: Path = (
        fixtures / "stories260K" / "model.gguf"
        if which == "stories260K"
        else request.getfixturevalue("default_model")
    )
    options: dict[str, Any] = {"ctx_size": 256, "max_num_seqs": 4, "deterministic": True}
    prompts = [f"Once upon a time there was a {who}. The {who} said: the {who}" for who in WHO]
    params = [replace(GREEDY, max_tokens=30, seed=i, temperature=0.7 * (i % 2)) for i in range(len(WHO))]
    llm = speculating(path, **options)
    outputs = llm.generate(prompts, params)
    assert [bits(o) for o in outputs] == [bits(o) for o in LLM(path, **options).generate(prompts, params)]
    assert sum(drafts_of(o).accepted for o in outputs) > 20


WHO = ("fox", "girl", "big dog", "king", "cat", "boy", "bird", "little bear")


def drafts_of(output: GenerationOutput) -> Any:
    assert output.metrics.drafts is not None
    return output.metrics.drafts


@pytest.mark.unoptimized
@pytest.mark.parametrize("who", ["same", "ngram"])
def test_growth_prefixes_and_aborts_leave_drafts_in_step(
    tiny_model: Path, drafts: dict[str, Path | None], who: str
) -> None:
    """Sequences that move to a larger pool, begin in another's slot, or lose a neighbour go on as before."""
    rng = random.Random(5)
    header = random_prompt(rng, 400)
    long = replace(GREEDY, max_tokens=60, logprobs=0, logit_bias={10: 100, 11: 100, 12: 100})
    prompts = [random_prompt(rng, 1000), [*header, 5, 6], random_prompt(rng, 1010), [*header, 9, 5, 6]]
    options: dict[str, Any] = {"max_num_seqs": 4, "deterministic": True}
    llm = speculating(tiny_model, drafts[who], **options)
    plain = [bits(o) for o in LLM(tiny_model, **options).generate(prompts, long)]
    for _ in llm.stream(header, long):  # left after a token
        break
    outputs = llm.generate(prompts, long)
    assert [bits(o) for o in outputs] == plain
    again = llm.generate(prompts, long)
    assert [bits(o) for o in again] == plain
    assert sum(o.usage.cached_tokens for o in again) > 1000
    if who == "same":
        assert sum(drafts_of(o).accepted for o in again) > 0.9 * sum(drafts_of(o).drafted for o in again)


def test_a_draft_that_fell_behind_reads_what_it_missed(tiny_model: Path) -> None:
    """After 150 plain steps the target's twin is right again at once."""

    class Late(Reckless):
        def lengths(
            self, pool: int, shape: Pool, records: Rows[DraftRecord], rooms: Rows[int]
        ) -> tuple[int, list[int]]:
            nonlocal steps
            steps += 1
            return shape.rows[-1], [3 if steps > 150 and rooms[0] >= 3 else 0]

    steps = 0
    llm = LLM(tiny_model, draft_model=tiny_model, max_num_seqs=12, dtype="float32", deterministic=True)
    llm.engine.scheduler.drafting = Late(3, is_free=False)
    output = llm.generate([random_prompt(random.Random(1), 30)], replace(GREEDY, max_tokens=200))[0]
    assert drafts_of(output).drafted >= 30
    assert drafts_of(output).accepted >= drafts_of(output).drafted - 3


@dataclass(frozen=True)
class Credulous(Speculative):
    """Believes every guess: the rule that must be caught."""

    def stands(self, is_right: Any, offsets: Any) -> Any:
        return jnp.ones_like(is_right) & (offsets >= 0)


def pair_frequencies(llm: LLM, prompt: list[int], params: SamplingParams) -> Counter[tuple[int, ...]]:
    """How often each pair of tokens came second and third: the ones that a guess may decide."""
    outputs = llm.generate([prompt], params)
    return Counter(tuple(o.token_ids[1:3]) for o in outputs)


SAMPLED = SamplingParams(temperature=1.0, top_k=3, max_tokens=3, n=1024, seed=8, ignore_eos=True)
TWELVE: dict[str, Any] = {"dtype": "float32", "deterministic": True, "max_num_seqs": 12}


@pytest.fixture(scope="module")
def sampled(tiny_model: Path) -> tuple[dict[tuple[int, ...], float], Counter[tuple[int, ...]]]:
    """What plain decoding's samples should be, by the model's probabilities, and what they are."""
    plain, prompt = LLM(tiny_model, **TWELVE), random_prompt(random.Random(3), 12)
    return _pairs(plain, prompt), pair_frequencies(plain, prompt, SAMPLED)


@pytest.mark.parametrize("who", ["same", "bad", "ngram", "credulous"])
def test_samples_follow_the_target(
    tiny_model: Path, drafts: dict[str, Path | None], sampled: tuple[dict, Counter], who: str
) -> None:
    """A chi-square test of 1,024 samples by the model's own probabilities; believing guesses fails it."""
    expected, plain = sampled
    llm = speculating(tiny_model, drafts["bad" if who == "credulous" else who], **TWELVE)
    if who == "credulous":
        right = llm.engine._runner._strategy
        assert isinstance(right, Speculative)
        llm.engine._runner._strategy = Credulous(right.target, right.drafter)
    found = pair_frequencies(llm, random_prompt(random.Random(3), 12), SAMPLED)
    statistic = sum((found[pair] - 1024 * p) ** 2 / (1024 * p) for pair, p in expected.items())
    outside = sum(count for pair, count in found.items() if pair not in expected)
    limit = len(expected) - 1 + 5 * (2 * len(expected)) ** 0.5  # five deviations
    if who == "credulous":
        assert outside or statistic > limit
    else:
        assert not outside and statistic < limit
        assert found == plain


def _pairs(llm: LLM, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """The probability of each second and third token, over all first ones, of the best three each."""
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for path, p in paths.items():
            scores = llm.logits([*prompt, *path])[-1]
            best = np.argsort(-scores, kind="stable")[:3]
            weights = np.exp(scores[best] - scores[best[0]])
            for token, weight in zip(best, weights / weights.sum(), strict=True):
                longer[(*path, int(token))] = p * float(weight)
        paths = longer
    pairs: Counter[tuple[int, ...]] = Counter()
    for path, p in paths.items():
        pairs[path[1:]] += p  # pyright: ignore[reportArgumentType]
    return dict(pairs)


@pytest.mark.unoptimized
def test_nothing_compiles_after_warmup(tiny_model: Path, drafts: dict[str, Path | None]) -> None:
    """Whatever is guessed and accepted."""
    llm = speculating(tiny_model, drafts["bad"], max_num_seqs=6, ctx_size=512, max_num_batched_tokens=256)
    assert llm.engine.warmup() == len(llm.engine.buckets.programs()) <= 24
    prompts, params = repetitive(4, 16)
    with count_compilations() as compiled:
        llm.generate(prompts, params)
        llm.generate(prompts[0], replace(GREEDY, max_tokens=30))
    assert not compiled


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 5))
def test_continuation_is_what_followed_before(text: list[int], offset: int) -> None:
    """As a plain search finds it: the longest match, the latest of these, in a circle past the end."""
    history = np.zeros((1, 48), np.int32)
    history[0, : len(text) - 1] = text[:-1]
    history[0, len(text) :] = 3  # garbage past the end
    tokens, known = continuation(
        jnp.asarray(history),
        jnp.asarray([len(text) - 1], jnp.int32),
        jnp.asarray(text[-1:], jnp.int32),
        jnp.asarray([offset], jnp.int32),
    )
    best = (0, 0)
    for end in range(len(text) - 1):
        run = 0
        while run < LONGEST and run <= end and text[end - run] == text[len(text) - 1 - run]:
            run += 1
        best = max(best, (run, end))
    assert bool(known[0]) == (best[0] >= SHORTEST)
    if known[0]:
        more = list(text)
        for i in range(offset + 1):
            more.append(more[best[1] + 1 + i])
        assert int(tokens[0]) == more[-1]


def test_what_cannot_draft_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", metadata={"tokenizer.ggml.eos_token_id": 1})
    with pytest.raises(UnsupportedError, match=r"other.gguf cannot draft .* EOS token is 1, the model's 2"):
        LLM(tiny_model, draft_model=other)
    short = write_model(tmp_path / "short.gguf", context=512)
    with pytest.raises(RequestError, match=r"the draft model: context is 2,048 tokens; .* trained for 512"):
        LLM(tiny_model, draft_model=short)
    with pytest.raises(RequestError, match="name the model that drafts"):
        LLM(tiny_model, spec_type="draft")
    with pytest.raises(RequestError, match="leave one of both out"):
        LLM(tiny_model, draft_model=tiny_model, spec_type="ngram")


@pytest.mark.unoptimized
def test_a_run_of_accepted_tokens_ends_where_the_sequence_does(
    tiny_model: Path, drafts: dict[str, Path | None]
) -> None:
    """At every length, and at every stop string, though more was accepted."""
    prompt = random_prompt(random.Random(2), 20)
    options: dict[str, Any] = {"max_num_seqs": 4, "deterministic": True}
    llm, plain = speculating(tiny_model, drafts["same"], **options), LLM(tiny_model, **options)
    whole = plain.generate([prompt], replace(GREEDY, max_tokens=24))[0]
    for length in range(1, 24):
        output = llm.generate([prompt], replace(GREEDY, max_tokens=length))[0]
        assert output.token_ids == whole.token_ids[:length]
        assert output.logprobs == (whole.logprobs or [])[:length]
        assert output.finish_reason is FinishReason.LENGTH
    stop = whole.text[len(whole.text) // 2 :][:3]
    params = replace(GREEDY, max_tokens=24, stop=(stop,))
    assert bits(llm.generate([prompt], params)[0]) == bits(plain.generate([prompt], params)[0])
