"""The scheduler's laws, checked against a pretend device that knows nothing of the scheduler's accounts."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from pretend_device import Scenario, Simulation, scenarios

import realm_jax
from realm_jax.config import Buckets
from realm_jax.errors import RequestError
from realm_jax.params import SamplingParams
from realm_jax.serving.request import FinishReason, Request, Sequence
from realm_jax.serving.scheduler import Decode, Move, Plan, Scheduler


def check(scenario: Scenario, kind: type[Scheduler] = Scheduler) -> None:
    Simulation(scenario, kind(scenario.buckets(), scenario.context)).run()


@settings(deadline=None, max_examples=150, phases=[Phase.reuse, Phase.generate])
@given(scenarios())
def test_every_law_holds_in_every_scenario(scenario: Scenario):
    check(scenario)


class Leaks(Scheduler):
    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.slot is None or sequence.finish_reason is not None or reason is not FinishReason.STOP:
            return super().finish(sequence, reason)
        sequence.finish_reason = reason
        return None


class Overflows(Scheduler):
    def _fits_step(self, sequence: Sequence, pool: int) -> bool:
        return sequence.wants_step and sequence.cached <= self.buckets.pools[pool].capacity


class PromptsFirst(Scheduler):
    def schedule(self) -> Plan | None:
        self._prefill_is_next = True
        return super().schedule()


class NeverMoves(Scheduler):
    def _move(self) -> Move | None:
        return None


class Crowds(Scheduler):
    def _running(self) -> Iterator[Sequence]:
        yield from list(super()._running())[:2]


class FirstPoolFirst(Scheduler):
    def _decode(self) -> Decode | None:
        self._next_pool = 0
        return super()._decode()


class ForgetsPrefill(Scheduler):
    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self._prefilling, kept = None, self._prefilling
        super().finish(sequence, reason)
        self._prefilling = None if kept is not None and kept.request.id == "0" else kept


BROKEN = [Leaks, Overflows, PromptsFirst, NeverMoves, Crowds, FirstPoolFirst, ForgetsPrefill]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_scheduler_is_found(kind: type[Scheduler]):
    @settings(deadline=None, max_examples=300, phases=[Phase.generate], database=None, derandomize=True)
    @given(scenarios())
    def search(scenario: Scenario) -> None:
        check(scenario, kind)

    with pytest.raises((AssertionError, ExceptionGroup)):
        search()


@pytest.mark.parametrize("length", [0, 100, 101, 5120])
def test_a_prompt_that_does_not_fit_is_refused_by_name(length: int):
    scheduler = Scheduler(Buckets.plan(100, 4), 100)
    with pytest.raises(RequestError, match="prompt is (empty|" + f"{length:,} tokens; the context is 100 )"):
        scheduler.add(Request("r", tuple(range(length)), SamplingParams(), seed=0))
    assert not scheduler.has_work


def test_ending_twice_changes_nothing():
    scheduler = Scheduler(Buckets.plan(100, 4), 100)
    (sequence,) = scheduler.add(Request("r", (1, 2), SamplingParams(), seed=0))
    scheduler.finish(sequence, FinishReason.ABORT)
    scheduler.finish(sequence, FinishReason.STOP)
    assert sequence.finish_reason is FinishReason.ABORT
    assert scheduler.commit(sequence, [5], ()) == []


def test_the_scheduler_loads_no_jax():
    code = "import sys, realm_jax.serving.scheduler; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    root = Path(realm_jax.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
