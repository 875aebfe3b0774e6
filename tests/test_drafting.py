"""Laws of how much is guessed: rows and rooms suffice, records add up, and nothing is slower than plain."""

import random
from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.buckets import Pool
from realm_jax.serving.drafting import Drafting, DraftRecord

COST = {1: 1.0, 4: 1.4, 8: 2.05, 16: 3.6}
"""Seconds of a step, as they grow on a processor that reads the weights once for few rows."""

POOL = Pool(1024, 16, tuple(COST), (1,))
MOST = 7


class Device:
    """Steps whose guesses are right by chance; each is read after the next was given, as the engine does.

    seconds: of the step with this number and so many rows. draft: of each guess of the longest run.
    """

    def __init__(
        self,
        drafting: Drafting,
        chances: list[float],
        *,
        is_free: bool = True,
        draft: float = 0.0,
        seconds: Callable[[int, int], float] = lambda _, rows: COST[rows],
    ) -> None:
        self._drafting, self._chances, self._is_free, self._draft = drafting, chances, is_free, draft
        self._seconds, self._rng = seconds, random.Random(1)
        self.records = [DraftRecord() for _ in chances]
        self.steps = self.tokens = self.asked = self.right = 0
        self.clock = 0.0

    def run(self, steps: int) -> "Device":
        """The sequences are so many steps further."""
        in_flight: deque[tuple[int, list[int], float, list[list[bool | None]]]] = deque()
        for _ in range(steps):
            rows, each = self._drafting.lengths(0, POOL, self.records, [10**9] * len(self.records))
            seconds = self._seconds(self.steps, rows) + self._draft * max(each)
            outcomes = [self._said(p, count, max(each)) for p, count in zip(self._chances, each, strict=True)]
            self.steps, self.clock = self.steps + 1, self.clock + seconds
            self.tokens += sum(len(said) for said in outcomes)
            in_flight.append((rows, each, seconds, outcomes))
            if len(in_flight) > 1:
                self._read(*in_flight.popleft())
        while in_flight:
            self._read(*in_flight.popleft())
        return self

    def _said(self, chance: float, asked: int, longest: int) -> list[bool | None]:
        said: list[bool | None] = []
        for j in range(asked + 1):
            is_right = self._rng.random() < chance
            said.append(is_right if self._is_free or (asked and j < longest) else None)
            if not is_right:
                break
        return said

    def _read(self, rows: int, each: list[int], seconds: float, outcomes: list[list[bool | None]]) -> None:
        self._drafting.took(0, rows, max(each), seconds)
        for record, asked, said in zip(self.records, each, outcomes, strict=True):
            self._drafting.learn(record, asked, said)
            self.asked, self.right = self.asked + asked, self.right + len(said) - 1

    @property
    def speed_up(self) -> float:
        """Tokens a second, as multiples of plain decoding's."""
        count = len(self.records)
        return self.tokens / self.clock * COST[POOL.rows_for(count)] / count


def gain(*chances: float) -> float:
    return Device(Drafting(MOST, is_free=True), list(chances)).run(400).speed_up


@pytest.mark.parametrize(
    ("batch", "tenths"), [(1, 0), (1, 2), (1, 4), (4, 5), (4, 7), (7, 7), (8, 8), (16, 10)]
)
def test_free_guesses_never_cost_much(batch: int, tenths: int) -> None:
    """Where a step with guesses is hardly worth it, and of sequences alike the luckiest seem to be better."""
    assert gain(*[tenths / 10] * batch) > 0.97


def test_good_guesses_pay() -> None:
    assert gain(0.95) > 1.8
    assert gain(1.0) > 3.5
    assert gain(0.95, 0, 0, 0) > 1.1  # the rows go to the one that is worth them
    drafted = Device(Drafting(MOST, is_free=False), [0.95], is_free=False, draft=0.2).run(150)
    assert drafted.speed_up > 1.6
    assert len(drafted.records[0].positions) == MOST  # as many at once as were allowed


def test_bad_guesses_of_a_model_are_left_out() -> None:
    """Though each try costs a step of the draft, and none says how good the next would be."""
    for chance in (0.0, 0.2):
        device = Device(Drafting(MOST, is_free=False), [chance], is_free=False, draft=0.2)
        assert device.run(250).speed_up > 0.93


@pytest.mark.parametrize("is_free", [True, False])
def test_steps_that_were_slow_once_are_tried_again(is_free: bool) -> None:
    """While something else had the processor, all steps with guesses took ten times as long."""

    def seconds(step: int, rows: int) -> float:
        return COST[rows] * (10 if step < 40 and rows > 1 else 1)

    drafting = Drafting(3, is_free=is_free)
    device = Device(drafting, [0.95], is_free=is_free, seconds=seconds).run(600)
    before = device.tokens, device.clock
    device.run(60)
    assert (device.tokens - before[0]) / (device.clock - before[1]) > 1.8


CHANCE = st.one_of(st.none(), st.floats(0, 1))
TIMES = st.tuples(st.sampled_from(POOL.rows), st.integers(0, 32), st.floats(1e-6, 10))


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(CHANCE, st.integers(0, 40)), min_size=1, max_size=16),
    st.integers(1, 32),
    st.booleans(),
    st.lists(TIMES, max_size=30),
)
def test_what_is_guessed_fits(
    sequences: list[tuple[float | None, int]], most: int, is_free: bool, times: list[tuple[int, int, float]]
) -> None:
    """The step has a compiled number of rows, a row for each sequence, and none gets more than its room."""
    drafting = Drafting(most, is_free=is_free)
    for rows, longest, seconds in times:
        drafting.took(0, rows, longest, seconds)
    records, rooms = [DraftRecord(chance=chance) for chance, _ in sequences], [room for _, room in sequences]
    rows, each = drafting.lengths(0, POOL, records, rooms)
    assert rows in POOL.rows
    assert len(each) == len(records)
    assert sum(each) <= rows - len(records)
    assert all(0 <= count <= min(room, most) for count, room in zip(each, rooms, strict=True))
    assert all(not count or record.chance != 0 for count, record in zip(each, records, strict=True))
    if not any(each):
        assert rows == POOL.rows_for(len(records))


@pytest.mark.parametrize("is_free", [True, False])
def test_records_add_up(is_free: bool) -> None:
    """What was verified and found right, of each sequence and of all, by distance from the newest token."""
    drafting = Drafting(MOST, is_free=is_free)
    device = Device(drafting, [0.9, 0.0, 0.6], is_free=is_free).run(100)
    total = drafting.total
    assert total.drafted == device.asked > 100
    assert 0 < total.accepted == device.right < total.drafted
    assert device.tokens == 100 * 3 + total.accepted
    for name in ("steps", "drafted", "accepted"):
        assert getattr(total, name) == sum(getattr(record, name) for record in device.records)
    for i, (tried, right) in enumerate(total.positions):
        assert tried == sum(r.positions[i][0] for r in device.records if len(r.positions) > i)
        assert total.steps >= tried >= right
        if i:  # a guess stands only where the ones before it do
            assert right <= total.positions[i - 1][1]
            assert tried <= total.positions[i - 1][0]


def test_a_guess_that_was_not_made_is_not_counted() -> None:
    """Rows were given for five guesses; the draft knew two, of which both were right."""
    record = DraftRecord()
    drafting = Drafting(MOST, is_free=True)
    drafting.learn(record, 5, [True, True, None])
    assert (record.steps, record.positions) == (1, [[1, 1], [1, 1]])
    drafting.learn(record, 5, [None])
    assert (record.steps, record.drafted) == (1, 2)
    drafting.learn(record, 3, [True, False])
    assert (record.steps, record.positions) == (2, [[2, 2], [2, 1], [1, 0]])
