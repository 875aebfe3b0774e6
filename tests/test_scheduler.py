"""The scheduler's laws, checked against a pretend device that knows nothing of the scheduler's accounts."""

import functools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
from broken_schedulers import FAULTS, Fault, broken
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from scenarios import SCENARIOS, Arrival, Scenario
from simulation import Simulation, scheduler_of

import realm_jax
from realm_jax.buckets import Buckets
from realm_jax.config import TILE, EngineConfig
from realm_jax.errors import CapacityError, RequestError
from realm_jax.params import SamplingParams
from realm_jax.serving.request import FinishReason, Request
from realm_jax.serving.scheduler import Scheduler


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """The tests' runtime type checks take three quarters of the time here, and there are no shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def arrival(length: int, max_tokens: int) -> Arrival:
    return Arrival(
        wait=0,
        header=0,
        shared=0,
        length=length,
        before=None,
        changed=None,
        max_tokens=max_tokens,
        score_from=None,
        n=1,
        owner=("", ()),
        priority=0,
        stop_every=10**9,
        abort_after=None,
    )


CROWDED = Scenario(
    shapes=((256, 2, (2,), (8,)), (512, 1, (1,), (8,))),
    unused=0,
    edge=64,
    max_num_seqs=100,
    max_queue=None,
    prefix_caching=True,
    arrivals=(arrival(300, 100), arrival(100, 20), arrival(255, 50), arrival(255, 50)),
    loses_before=None,
    reads_early=(False,),
)
"""The third and then the fourth fill their slots, while the first holds the only larger one."""


@settings(deadline=None, max_examples=500, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(SCENARIOS)
@example(CROWDED)
def test_every_law_holds_in_every_scenario(scenario: Scenario):
    Simulation(scenario, scheduler_of(scenario)).run()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_prompts_that_come_in_turn_each_find_their_own_prefix(data: st.DataObject):
    """One at a time, and fewer than there are slots: of none anything is computed a second time."""
    slots = data.draw(st.integers(2, 6))
    rows = sorted(data.draw(st.sets(st.integers(1, slots - 1), max_size=2)))
    lengths = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=slots - 1))
    order = data.draw(st.permutations(range(len(lengths))))
    first = [replace(arrival(n, 5), header=i, shared=n, wait=999) for i, n in enumerate(lengths)]
    again = [replace(first[i], length=lengths[i] + 70) for i in order]
    arrivals = (*first, *again)
    scenario = replace(CROWDED, shapes=((512, slots, (*rows, slots), (8,)),), arrivals=arrivals)
    simulation = Simulation(scenario, scheduler_of(scenario))
    simulation.run()
    found = [sequence.reused for sequence in simulation.scripts]
    assert found == [0] * len(first) + [lengths[i] // TILE * TILE for i in order]


@functools.cache
def many_scenarios() -> tuple[Scenario, ...]:
    found: list[Scenario] = []

    @settings(deadline=None, max_examples=1200, phases=[Phase.generate], database=None, derandomize=True)
    @given(SCENARIOS)
    def draw(scenario: Scenario) -> None:
        found.append(scenario)

    draw()
    return CROWDED, *found


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_scheduler_is_found(fault: Fault):
    with pytest.raises(AssertionError):
        for scenario in many_scenarios():
            Simulation(scenario, broken(fault, scenario)).run()


def scheduler(*, max_queue: int | None = None) -> Scheduler:
    return Scheduler(Buckets.plan(100, EngineConfig(max_num_seqs=4)), 100, max_queue=max_queue)


def request(length: int, **params: int) -> Request:
    return Request("r", tuple(range(length)), SamplingParams(**params), seed=0)  # pyright: ignore


@pytest.mark.parametrize(("length", "max_tokens"), [(0, None), (100, None), (100, 1), (101, 0), (5120, 9)])
def test_a_prompt_that_does_not_fit_is_refused_by_name(length: int, max_tokens: int | None):
    refuses = scheduler()
    params = SamplingParams(max_tokens=max_tokens)
    with pytest.raises(RequestError, match="prompt is (empty|" + f"{length:,} tokens; the context is 100 )"):
        refuses.add(Request("r", tuple(range(length)), params, seed=0))
    assert not refuses.has_work


def test_a_prompt_that_is_only_scored_may_fill_the_context():
    assert len(scheduler().add(request(100, max_tokens=0, prompt_logprobs=0))) == 1


def test_a_full_queue_is_refused_with_its_limit_and_keeps_what_it_had():
    full = scheduler(max_queue=2)
    full.add(request(3, n=6))
    with pytest.raises(CapacityError, match="6 sequences wait and max_queue is 2; "):
        full.add(request(3))
    assert full.num_waiting == 6


def test_ending_twice_changes_nothing():
    ends = scheduler()
    (sequence,) = ends.add(request(2))
    ends.finish(sequence, FinishReason.ABORT)
    ends.finish(sequence, FinishReason.STOP)
    assert sequence.finish_reason is FinishReason.ABORT
    assert ends.commit(sequence, [5], ()) == []


def test_the_scheduler_loads_no_jax():
    code = "import sys, realm_jax.serving.scheduler; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    root = Path(realm_jax.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
