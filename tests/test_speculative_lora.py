"""Adapters beside guesses: each request's output is plain decoding's, whatever stands in the batch."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from test_batching import bits
from test_lora_applied import GREEDY, prompts, random_adapter
from test_speculative import Reckless
from tiny import write_model

from realm_jax import LLM


def test_adapters_and_guesses(tmp_path: Path) -> None:
    """Requests without adapters, with one, and with two, some of few words: more adapters than the bank has.

    The draft is the model without adapters: of what changed requests say it is often wrong.
    """
    path = write_model(tmp_path / "small.gguf", layers=1)
    options: dict[str, Any] = {"ctx_size": 128, "max_num_seqs": 4, "max_loras": 2, "deterministic": True}
    options |= {"max_num_batched_tokens": 64, "prefix_caching": False}
    plain = with_adapters(LLM(path, **options))
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
        llm = with_adapters(LLM(path, **options, **guesser))
        llm.engine.scheduler.drafting = Reckless(
            llm.engine_config.spec_tokens, is_free="spec_type" in guesser
        )
        outputs = llm.generate(ids, params, lora=named)
        assert [bits(o) for o in outputs] == [bits(o) for o in expected]
        changed = [o.metrics.drafts for o, adapters in zip(outputs, named, strict=True) if adapters]
        accepted, drafted = sum(d.accepted for d in changed if d), sum(d.drafted for d in changed if d)
        assert 0 < accepted < 0.9 * drafted


def with_adapters(llm: LLM) -> LLM:
    """The model with three adapters that requests may name."""
    for i, rank in enumerate((3, 8, 16)):
        llm.engine.load_adapter(str(i), random_adapter(llm, i, rank))
    return llm
