"""Laws of structured output: the form is kept, and nothing else of an answer or its neighbours changes."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import count_compilations
from schemas import conforms, random_schema
from test_batching import bits
from test_engine import GREEDY, mixed_requests, random_prompt
from test_speculative import speculating
from tiny import write_model

from realm_jax import LLM, RequestError, SamplingParams, StructuredOutput
from realm_jax.serving.request import FinishReason, GenerationOutput

pytestmark = pytest.mark.unoptimized

SHAPES: dict[str, Any] = {"max_num_seqs": 8, "ctx_size": 512}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    llm = LLM(tiny_model, **SHAPES)
    yield llm
    llm.engine.grammars.close()


def formed(form: StructuredOutput, **more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 450, "structured_output": form, **more})


def test_every_answer_is_json_that_its_schema_accepts(llm: LLM) -> None:
    """Of a model that knows nothing, greedy and at every temperature, two samples each."""
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(40)]
    heat = [0.0, 0.3, 1.0, 2.0, 10.0]
    params = [
        formed(StructuredOutput(json_schema=schema), temperature=heat[i % 5], seed=i, n=1 + (i % 5 > 0))
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate([random_prompt(rng, 1 + i) for i in range(40)], params)
    wanted = [schema for schema, each in zip(schemas, params, strict=True) for _ in range(each.n)]
    for output, schema in zip(outputs, wanted, strict=True):
        assert output.finish_reason is FinishReason.STOP, (output.text, schema)
        assert conforms(json.loads(output.text), schema), (output.text, schema)
    texts = [output.text for output in outputs]
    assert len(set(texts)) > 40, "hardly anything was left to choose"


def test_expressions_choices_and_grammars_are_kept(llm: LLM) -> None:
    patterns = [
        r"[0-9]{3}-[0-9]{4}",
        r"(yes|no)( word1+)?",
        r"[a-z ]{5,9}[.!?]",
        r"<<[^>\x00-\x1f]{1,5}>>",
        "ä+b?c",
    ]
    choices = ("red", "red wine", "ワイン", 'a "b"\n', "\U0001f600")
    lark = 'start: "x" ("+" NUMBER)~1..3\nNUMBER: /[0-9]{1,2}/'
    gbnf = 'root ::= "(" root ")" | [a-c] [a-c]?'
    forms: dict[StructuredOutput, str] = {StructuredOutput(regex=p): p for p in patterns}
    forms[StructuredOutput(choice=choices)] = "|".join(map(re.escape, choices))
    forms[StructuredOutput(grammar=lark)] = r"x(\+[0-9]{1,2}){1,3}"
    forms[StructuredOutput(grammar=gbnf)] = r"\(*[a-c]{1,2}\)*"
    params = [formed(form, temperature=2.0, seed=i, n=4, max_tokens=100) for i, form in enumerate(forms)]
    outputs = llm.generate([[5, 6, 7]] * len(forms), params)
    for output, pattern in zip(outputs, (p for p in forms.values() for _ in range(4)), strict=True):
        if output.finish_reason is FinishReason.STOP:
            assert re.fullmatch(pattern, output.text), (pattern, output.text)
        else:  # a model that knows nothing may go on and on where it may
            assert "+b" in pattern or (pattern.startswith(r"\(") and set(output.text) == {"("})
        assert output.text.count("(") == output.text.count(")") or output.text.endswith("(")
    assert sum(output.finish_reason is FinishReason.STOP for output in outputs) >= 4 * (len(forms) - 2)
    anything = llm.generate([[5]], formed(StructuredOutput(json_object=True), seed=2, temperature=3.0))[0]
    assert anything.text.startswith("{")


def mixture(seed: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Requests of all kinds, every second one with a form."""
    rng = random.Random(seed)
    prompts, params = mixed_requests(seed, 16)
    prompts = [prompt[:300] for prompt in prompts]
    for i in range(0, 16, 2):
        form = StructuredOutput(json_schema=random_schema(rng))
        if i % 8 == 2:
            form = StructuredOutput(regex=r"([a-z]{2,5} ){1,6}[0-9]{3}")
        params[i] = replace(
            params[i], structured_output=form, max_tokens=rng.choice([5, 40]), ignore_eos=i % 4 < 2
        )
        if i % 8 == 4:
            params[i] = replace(params[i], stop=("e", '"'), n=2, repetition_penalty=1.5)
    return prompts, params


def test_in_company_it_is_as_alone_and_others_are_as_ever(llm: LLM, tiny_model: Path) -> None:
    """Tokens, text, ends and log-probabilities to the last bit; the others' are those without any forms."""
    prompts, params = mixture(3)
    together = llm.generate(prompts, params)
    alone = [o for p, q in zip(prompts, params, strict=True) for o in llm.generate([p], q)]
    assert [bits(o) for o in together] == [bits(o) for o in alone]
    free = [i for i in range(16) if params[i].structured_output is None]
    plain = LLM(tiny_model, **SHAPES)
    expected = plain.generate([prompts[i] for i in free], [params[i] for i in free])
    by_id = {tuple(prompts[i]): bits(o) for i, o in zip(free, expected, strict=True)}
    found = [o for o in together if tuple(o.prompt_token_ids) in by_id]
    assert len(found) == len(free) == 8
    assert [bits(o) for o in found] == [by_id[tuple(o.prompt_token_ids)] for o in found]


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    """The form decides what comes, not how likely the model finds it."""
    prompt = [5, 6, 7]
    form = StructuredOutput(choice=["word9", "word1"])
    output = llm.generate([prompt], replace(GREEDY, structured_output=form, logprobs=2))[0]
    logits = llm.logits(prompt)[-1].astype(np.float64)
    expected = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    assert output.logprobs is not None
    first = output.logprobs[0]
    assert first["logprob"] == pytest.approx(expected[first["token_id"]], abs=0.02)
    assert [token for token, _ in first["top"]] == np.argsort(-expected)[:2].tolist()
    assert first["token_id"] not in np.argsort(-expected)[:2]  # or the test says nothing


@pytest.mark.parametrize("who", ["ngram", "draft"])
def test_speculative_is_plain(llm: LLM, tiny_model: Path, tmp_path: Path, who: str) -> None:
    """Those with a form take no guesses; those beside them do."""
    draft = None
    if who == "draft":
        draft = write_model(tmp_path / "draft.gguf", layers=1, width=32, heads=2, seed=9)
    guessing = speculating(tiny_model, draft, deterministic=True, **SHAPES)
    prompts, params = mixture(4)
    for i in range(1, 16, 2):
        params[i] = replace(params[i], max_tokens=40, logit_bias={10: 100, 11: 100})
    outputs = guessing.generate(prompts, params)
    assert [bits(o) for o in outputs] == [bits(o) for o in llm.generate(prompts, params)]
    drafted = {o.request_id: o.metrics.drafts.drafted for o in outputs if o.metrics.drafts is not None}
    formed = {f"request-{i}" for i in range(16) if params[i].structured_output is not None}
    assert not any(drafted[name] for name in formed)
    assert sum(drafted.values()) > 20
    guessing.engine.grammars.close()


def test_nothing_compiles_after_warmup(llm: LLM) -> None:
    count = llm.engine.warmup()
    prompts, params = mixture(5)
    with count_compilations() as compiled:
        llm.generate(prompts, params)
    assert not compiled and len(llm.engine.programs) == count == len(llm.engine.buckets.programs())


def test_an_answer_ends_where_its_form_does(llm: LLM) -> None:
    """At max_tokens it is cut, and so it says; if its last token is the last allowed, it is whole."""
    form = StructuredOutput(regex="[a-z]{30}")
    whole = llm.generate([[5, 6]], formed(form, temperature=0))[0]
    count = len(whole.token_ids)
    assert whole.finish_reason is FinishReason.STOP and len(whole.text) == 30

    def at_most(tokens: int) -> GenerationOutput:
        return llm.generate([[5, 6]], formed(form, temperature=0, max_tokens=tokens))[0]

    assert at_most(count).finish_reason is FinishReason.STOP
    cut = at_most(count - 1)
    assert cut.finish_reason is FinishReason.LENGTH and whole.text.startswith(cut.text)
    assert cut.token_ids == whole.token_ids[:-1]


def test_a_dead_end_ends_the_answer_and_harms_nobody(llm: LLM) -> None:
    """A rule that no text can satisfy, found only behind the first letters."""
    form = StructuredOutput(grammar='start: "abc" never\nnever: never "x"')
    expected = bits(llm.generate([[9, 8]], GREEDY)[0])
    stuck, free = llm.generate([[9, 8], [9, 8]], [formed(form), GREEDY])
    assert stuck.finish_reason is FinishReason.ERROR and "abc".startswith(stuck.text)
    assert bits(free) == expected and not llm.engine.has_work


def test_what_is_refused_never_enters_the_engine(llm: LLM) -> None:
    expected = bits(llm.generate([[9, 8]], GREEDY)[0])
    with pytest.raises(RequestError, match=r"regex cannot be used: .*unclosed group"):
        llm.generate([[5], [6]], [GREEDY, formed(StructuredOutput(regex="(a"))])
    assert not llm.engine.has_work and bits(llm.generate([[9, 8]], GREEDY)[0]) == expected


def test_an_abandoned_answer_leaves_nothing(llm: LLM) -> None:
    form = formed(StructuredOutput(regex="[a-z]{50}"), temperature=0)
    expected = llm.generate([[7, 7]], form)[0].text
    for delta in llm.stream([7, 7], form):
        if len(delta.text) >= 1:
            break
    assert not llm.engine.has_work and llm.generate([[7, 7]], form)[0].text == expected


def test_a_deep_chain_of_rules_is_served(llm: LLM) -> None:
    """4,000 rules, each of which is the next, would overflow the stack of an ordinary thread."""
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(4000))
    output = llm.generate([[5]], formed(StructuredOutput(grammar=f'start: r0\n{rules}r4000: "abc"')))[0]
    assert output.text == "abc"
