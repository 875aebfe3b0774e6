"""Tenants on one scheduler: shares by weight, short waits beside a flood, slots that are not kept in vain."""

import math
from collections import Counter
from dataclasses import dataclass, field

import jaxtyping
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from realm_jax.buckets import Buckets
from realm_jax.config import EngineConfig
from realm_jax.errors import CapacityError, RequestError
from realm_jax.params import SamplingParams
from realm_jax.serving.fairness import KEPT, LINGER, OUTPUT_COST, FairQueue
from realm_jax.serving.plans import Decode, Prefill
from realm_jax.serving.request import FinishReason, Request, Sequence
from realm_jax.serving.scheduler import Scheduler

SLOTS = 16


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch):
    """The tests' runtime type checks take most of the time here, and there are no shapes."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@dataclass
class Run:
    """A scheduler on a device whose calls each take one unit of time; all tokens are read at once."""

    slots: int = SLOTS
    max_queue: int | None = None
    context: int = 1024
    clock: int = 0
    served: Counter[str] = field(default_factory=Counter)  # by tenant
    started: dict[Sequence, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        buckets = Buckets.plan(self.context, EngineConfig(max_num_seqs=self.slots))
        self.scheduler = Scheduler(buckets, self.context, max_queue=self.max_queue, prefix_caching=False)

    def add(self, tenant: str, count: int = 1, *, weight: float = 1.0, prompt: int = 100, output: int = 100):
        """So many requests of one size; returns the last one's sequence."""
        params, ids = SamplingParams(max_tokens=output), tuple(range(prompt))
        request = Request("r", ids, params, seed=0, tenant=tenant, weight=weight)
        return [self.scheduler.add(request)[0] for _ in range(count)][-1]

    def running(self, tenant: str) -> int:
        held = (slot.sequence for slot in self.scheduler.slots.taken())
        return sum(each is not None and each.request.tenant == tenant for each in held)

    def call(self) -> None:
        """One call of the device, or of nothing where all wait."""
        self.clock += 1
        plan = self.scheduler.schedule()
        while plan is not None and not isinstance(plan, Prefill | Decode):
            plan = self.scheduler.schedule()
        if isinstance(plan, Prefill):
            for tile in plan.tiles:
                self.served[tile.sequence.request.tenant] += len(tile.tokens)
            ready = [tile.sequence for tile in plan.tiles if tile.is_last]
        else:
            ready = [each for each in plan.sequences if each is not None] if plan is not None else []
        for sequence in ready:
            self.started.setdefault(sequence, self.clock)
            taken = self.scheduler.commit(sequence, [1], ())
            self.served[sequence.request.tenant] += OUTPUT_COST * len(taken)

    def calls(self, count: int) -> None:
        for _ in range(count):
            self.call()

    def latency(self, *, prompt: int, output: int) -> int:
        """Calls from the arrival of a request of tenant B to its end."""
        begun = self.clock
        sequence = self.add("B", prompt=prompt, output=output)
        while sequence.finish_reason is None:
            assert self.clock - begun < 100_000, "starves"
            self.call()
        return self.clock - begun


@pytest.mark.parametrize(("prompt", "output"), [(30, 20), (100, 60), (300, 100), (60, 250)])
@pytest.mark.parametrize("flood", [(100, 100), (20, 300), (400, 50)])
def test_beside_a_flood_a_tenant_waits_little(prompt: int, output: int, flood: tuple[int, int]):
    """B asks one question after another; A comes with 200 requests at once, and all slots fill.

    While A's prompts are computed, they and the steps take turns: then a step takes two calls.
    """
    run, took = Run(), []
    alone = run.latency(prompt=prompt, output=output)
    run.add("A", 200, prompt=flood[0], output=flood[1])
    run.calls(30)
    assert run.running("A") >= SLOTS - 2
    while run.scheduler.num_waiting:
        took.append(run.latency(prompt=prompt, output=output))
        run.calls(20)
    assert len(took) >= 3 and sum(took) / len(took) <= 1.5 * alone
    assert max(took) <= 2 * alone + 4


def test_who_was_never_here_waits_for_one_slot_at_most():
    run = Run()
    run.add("A", 200, output=150)
    run.calls(100)
    assert run.running("A") == SLOTS  # nothing is kept for nobody
    run.latency(prompt=50, output=1)
    assert run.clock < 100 + 2 * 150


@settings(deadline=None, max_examples=8, phases=[Phase.reuse, Phase.generate])
@given(data=st.data())
def test_those_who_wait_are_served_by_their_weights(data: st.DataObject):
    """Whatever the requests' sizes, over many of them."""
    sizes = st.tuples(st.integers(10, 300), st.integers(5, 120))
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=3))
    run = Run()
    for number, weight in enumerate(weights):
        prompt, output = data.draw(sizes)
        count = 3000 * SLOTS // (prompt + OUTPUT_COST * output) + SLOTS
        run.add(str(number), int(count * weight), weight=weight, prompt=prompt, output=output)
    lines = run.scheduler.queue._accounts.values()
    while all(each.waiting for each in lines):
        run.call()
    served = [run.served[str(number)] / weight for number, weight in enumerate(weights)]
    assert max(served) <= 1.05 * min(served)


def test_idle_time_earns_nothing_and_an_idle_engine_costs_nothing():
    run = Run()
    run.latency(prompt=100, output=10)
    run.add("A", 100)
    while run.scheduler.has_work:
        run.call()
    run.add("B", 200)  # served nothing, while A had the engine for itself
    run.add("A", 200)
    before = Counter(run.served)
    run.calls(400)
    served = run.served - before
    assert 0.8 < served["A"] / served["B"] < 1.25


def test_a_tenant_with_little_to_ask_saves_no_credit():
    """B always runs one sequence while A waits with many; then B comes with many, too."""
    run = Run()
    run.latency(prompt=10, output=1)
    run.add("A", 600)
    for _ in range(10):
        run.latency(prompt=10, output=100)
    run.add("B", 400, prompt=100, output=100)
    before = Counter(run.served)
    run.calls(1000)
    served = run.served - before
    assert 0.75 < served["A"] / served["B"] < 1.33


@settings(deadline=None, max_examples=20, phases=[Phase.reuse, Phase.generate])
@given(data=st.data())
def test_no_slot_is_free_while_somebody_waits_but_the_few_that_are_kept(data: st.DataObject):
    slots = data.draw(st.sampled_from([1, 2, 7, 8, 16, 24]))
    run = Run(slots)
    for _ in range(12):
        tenant = data.draw(st.sampled_from("ABCDE"))
        count, output = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
        run.add(
            tenant, count, prompt=data.draw(st.integers(1, 64)), output=output, weight=1 + ord(tenant) % 3
        )
        for _ in range(data.draw(st.integers(0, 60))):
            run.call()
            prefilling = sum(s.tiles_left for s in run.scheduler._prefilling)
            if run.scheduler.num_waiting and not prefilling and run.scheduler._prefill_is_next:
                run.scheduler._admit()
                taken = len(list(run.scheduler.slots.taken()))
                most = max(pool.tiles[-1] for pool in run.scheduler.buckets.pools)
                is_call_full = sum(s.tiles_left for s in run.scheduler._prefilling) >= most
                if run.scheduler.num_waiting and not is_call_full:
                    assert slots - taken <= slots // KEPT
    while run.scheduler.has_work:
        run.call()
        assert run.clock < 20_000, "starves"


def test_kept_slots_are_for_those_below_their_share():
    """B's is taken at once, although all that are free are kept for others."""
    run = Run()
    for tenant in "CDB":
        run.add(tenant, prompt=10, output=1)
    run.calls(10)
    run.add("A", 100, output=200)
    run.calls(30)
    assert run.running("A") == SLOTS - SLOTS // KEPT
    assert run.latency(prompt=10, output=10) < 30


def test_who_comes_anew_stands_with_the_last_of_those_who_wait():
    queue, params = FairQueue(1), SamplingParams(max_tokens=1)
    a, b, c = (Sequence(Request(n, (1,), params, seed=0, tenant=n), 0, 1) for n in "abc")
    queue.push(a)
    queue.push(b)
    queue.charge(b, output=1000)
    queue.push(c)
    assert list(queue.candidates()) == [a, c, b]


def test_a_kept_slot_is_given_up():
    run = Run()
    run.latency(prompt=10, output=1)
    begun = run.clock
    run.add("A", 2000, output=60)
    run.calls(60)
    assert run.running("A") == SLOTS - 1
    while run.running("A") < SLOTS and run.clock < 2 * LINGER:
        run.call()
    assert begun + LINGER - 80 <= run.clock <= begun + LINGER + 80


def test_what_does_not_fit_lets_others_pass_but_not_for_ever():
    """Four slots hold long prompts. A's are full of them, and its next long one is first in turn."""
    run = Run(context=4096)
    run.add("A", 5, prompt=2000, output=600)
    run.calls(300)
    waits = [s for account in run.scheduler.queue._accounts.values() for _, _, s in account.line]
    assert run.running("A") == 4 and len(waits) == 1
    run.scheduler.queue._accounts["A"].served = -math.inf  # whatever B was served, A's turn comes first
    assert run.latency(prompt=50, output=20) < 40
    run.add("B", 100, prompt=50, output=20)
    run.calls(250)
    assert run.scheduler.queue._accounts["A"].passed == SLOTS
    assert run.running("B") == 0  # those after the sixteenth wait with it
    while run.scheduler.queue._accounts["A"].waiting:
        run.call()
    assert run.scheduler.queue._accounts["A"].passed == 0
    run.calls(2000)
    assert not run.scheduler.has_work


def test_a_flood_leaves_room_in_the_queue():
    run = Run(max_queue=40)
    with pytest.raises(CapacityError, match="56 sequences wait and max_queue is 40"):
        run.add("A", 57)
    run.add("B", 20)
    with pytest.raises(CapacityError):
        run.add("B")
    with pytest.raises(CapacityError):
        run.add("A")


def test_tenants_that_left_are_forgotten():
    run = Run()
    for number in range(50):
        run.add(str(number), output=1)
    (last,) = [run.add("stays", output=10**3 - 100)]
    while last.finish_reason is None:
        run.call()
    run.calls(2 * LINGER)
    assert run.scheduler.queue._accounts.keys() <= {"stays"}


@pytest.mark.parametrize("weight", [0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float):
    with pytest.raises(RequestError, match=r"weight is .*; give a number above 0"):
        Run().add("A", weight=weight)


def test_those_that_end_while_they_wait_take_no_turn():
    run = Run(slots=1)
    run.add("A", output=50)
    run.calls(3)
    first, second = run.add("B"), run.add("B")
    run.scheduler.finish(first, FinishReason.ABORT)
    while second.finish_reason is None:
        run.call()
    assert first not in run.started and second in run.started
