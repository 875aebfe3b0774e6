"""A flood on the real engine, by its own steps: `scripts/bench_flood` measures the same in seconds."""

from pathlib import Path

import pytest
from bench_flood import Neighbours, Sizes, report
from tiny import VOCAB

from realm_jax import LLM

pytestmark = pytest.mark.unoptimized


def test_beside_a_flood_a_tenant_waits_no_longer_than_on_a_busy_engine(tiny_model: Path) -> None:
    """At most 1.5 times the steps that it takes with its fair share, to the first token and to the end."""
    llm, steps = LLM(tiny_model, max_num_seqs=16, ctx_size=1024), 0
    step = llm.engine.step

    def counted():
        nonlocal steps
        steps += 1
        return step()

    llm.engine.step = counted
    both = Neighbours(llm, Sizes(prompt=60, answer=20, vocab=VOCAB), lambda: steps)
    found = report([{name: both.measure(count, 6) for name, count in both.crowds().items()}])
    for what in ("first", "whole"):
        assert found[what]["flood/share"] <= 1.5 and found[what]["flood/busy"] <= 1.5, found
    assert not llm.engine.has_work
