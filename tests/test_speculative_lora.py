"""Adapters beside guesses: each request's output is plain decoding's, whatever stands in the batch."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from test_batching import bits
from test_lora_applied import GREEDY, prompts, random_adapter
from test_speculative import Reckless
from tiny import write_model

from realm_jax import LLM, SamplingParams, StructuredOutput
from realm_jax.serving.request import FinishReason

OPTIONS: dict[str, Any] = {
    "ctx_size": 128,
    "max_num_seqs": 4,
    "max_loras": 2,
    "deterministic": True,
    "max_num_batched_tokens": 64,
    "prefix_caching": False,
}


def test_adapters_and_guesses(tmp_path: Path) -> None:
    """Requests without adapters, with one, and with two, some of few words: more adapters than the bank has.

    The draft is the model without adapters: of what changed requests say it is often wrong.
    """
    path = write_model(tmp_path / "small.gguf", layers=1)
    plain = with_adapters(LLM(path, **OPTIONS))
    ids = [[*prompt[:80], 5, 6, 7] for prompt in prompts(12)]
    named = [None, [("0", 1.0)], [("1", -0.5)], [("0", 0.5), ("2", 1.0)], [("2", 1.0)], [("1", 1.0)]] * 2
    few = {10: 100, 11: 100, 12: 100}
    params = [replace(GREEDY, max_tokens=30, logit_bias=few if i % 4 == 1 else {}) for i in range(12)]
    params[4:8] = [replace(each, temperature=0.8, seed=i) for i, each in enumerate(params[4:8])]
    expected = plain.generate(ids, params, lora=named)
    without = plain.generate(ids, params)
    assert sum(a.token_ids != b.token_ids for a, b in zip(expected, without, strict=True)) > 5
    guessers: list[dict[str, Any]] = [{"draft_model": path}, {"spec_type": "ngram"}]
    for guesser in guessers:
        llm = with_adapters(LLM(path, **OPTIONS, **guesser))
        llm.engine.scheduler.drafting = Reckless(
            llm.engine_config.spec_tokens, is_free="spec_type" in guesser
        )
        outputs = llm.generate(ids, params, lora=named)
        assert [bits(o) for o in outputs] == [bits(o) for o in expected]
        changed = [o.metrics.drafts for o, adapters in zip(outputs, named, strict=True) if adapters]
        accepted, drafted = sum(d.accepted for d in changed if d), sum(d.drafted for d in changed if d)
        assert 0 < accepted < 0.9 * drafted


def test_forms_adapters_and_guesses(tmp_path: Path) -> None:
    """Each answer keeps the form that its own request asks for, and is the one that it gets alone."""
    path = write_model(tmp_path / "small.gguf", layers=1)
    numbers = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3}
    forms = [
        (StructuredOutput(regex="[a-d]{9} [0-9]{3}"), lambda text: re.fullmatch("[a-d]{9} [0-9]{3}", text)),
        (StructuredOutput(choice=("red", "green wine")), ("red", "green wine").__contains__),
        (StructuredOutput(json_schema=numbers), lambda text: all(0 <= n <= 99 for n in json.loads(text))),
        (None, lambda text: True),
    ]
    ids = [[*prompt[:20], 5, 6, 7] for prompt in prompts(12)]
    named = [None, [("0", 1.0)], [("1", -0.5)], [("0", 0.5), ("2", 1.0)], [("2", 1.0)]] * 3
    params = [
        SamplingParams(structured_output=forms[i % 4][0], max_tokens=90, seed=i, temperature=0.8 * (i % 3))
        for i in range(12)
    ]
    plain = with_adapters(LLM(path, **OPTIONS))
    alone = [plain.generate([p], q, lora=[a])[0] for p, q, a in zip(ids, params, named, strict=False)]
    llm = with_adapters(LLM(path, **OPTIONS, spec_type="ngram"))
    llm.engine.scheduler.drafting = Reckless(llm.engine_config.spec_tokens, is_free=True)
    outputs = llm.generate(ids, params, lora=named[:12])
    assert [bits(o) for o in outputs] == [bits(o) for o in alone]
    for i, output in enumerate(outputs):
        assert i % 4 == 3 or (output.finish_reason is FinishReason.STOP and forms[i % 4][1](output.text))
    assert sum(o.metrics.drafts.accepted for o in outputs if o.metrics.drafts) > 0
    for each in (plain, llm):
        each.engine.grammars.close()


def with_adapters(llm: LLM) -> LLM:
    """The model with three adapters that requests may name."""
    for i, rank in enumerate((3, 8, 16)):
        llm.engine.load_adapter(str(i), random_adapter(llm, i, rank))
    return llm
