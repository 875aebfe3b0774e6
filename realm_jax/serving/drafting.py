"""How many guesses to verify for each sequence. Plain Python: no JAX, no clock.

A step's rows are shared out where a guess is likeliest to be right, and the step has as many rows as give
most tokens a second, by what steps took so far (as the goodput of Liu et al. 2024). With every sequence
busy, or with bad guesses, that is plain decoding.
"""

from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from realm_jax.buckets import Pool

LEARNING_RATE = 0.15
"""The share of the newest guess in the chance that the next one is right. A larger share follows a text
sooner, but of many sequences the luckiest then have the rows, and what is promised does not come."""

COMMON_RATE = 0.03
"""The same share in what a draft model's guesses are worth for sequences that begin."""

RETRY = 0.01
"""The share of what is assumed of guesses at first in that chance, for each token without a guess."""

WORTH_IT = 1.15
"""A step with guesses must promise so many times as many tokens a second as one without."""

KEPT, TRUSTED = 8, 3
"""Of a kind of step, the fastest of so many last ones counts, once there are so many."""

FORGET = 64
"""After so many steps every other kind has lost its oldest time: what was slow once is tried again."""


@dataclass
class DraftRecord:
    """What became of a sequence's guesses: the mutable record.

    steps: those with guesses to verify. positions: by how far a guess was from the newest token, guesses
    verified and found right.
    """

    steps: int = 0
    positions: list[list[int]] = field(default_factory=list)
    chance: float | None = None  # that the next guess is right

    @property
    def drafted(self) -> int:
        return sum(tried for tried, _ in self.positions)

    @property
    def accepted(self) -> int:
        return sum(right for _, right in self.positions)

    def count(self, asked: int, right: int) -> None:
        """A step verified `asked` guesses, of which the first `right` stand."""
        if not asked:
            return
        self.steps += 1
        self.positions += [[0, 0] for _ in range(asked - len(self.positions))]
        for i in range(asked):
            self.positions[i][0] += 1
            self.positions[i][1] += i < right


class Drafting:
    """The guesses of each step, for a drafter that makes up to `most` a sequence.

    is_free: whether its guesses cost next to nothing; then every token says how good they are.
    """

    def __init__(self, most: int, *, is_free: bool) -> None:
        self._most, self._is_free = most, is_free
        self._seconds: dict[tuple[int, int, int], deque[float]] = {}
        self._first_chance = 0.0 if is_free else 0.7
        self._usual = self._first_chance  # of a sequence that begins: what became of others' guesses
        self._steps = 0
        self.total = DraftRecord()  # of all sequences

    def lengths(
        self, pool: int, shape: Pool, records: Rows[DraftRecord], rooms: Rows[int]
    ) -> tuple[int, list[int]]:
        """The rows of a step of these sequences, and how many guesses it verifies of each.

        rooms: how many tokens each may get besides the one of a plain step.
        """
        count = len(records)
        chances = [self._chance(record) for record in records]
        limits = [min(room, self._most) for room in rooms]
        plain = shape.rows_for(count)
        best, best_rate = (plain, [0] * count), WORTH_IT * count / self._cost(pool, plain, 0)
        for rows in shape.rows:
            if rows < count:
                continue
            for cap in self._caps():
                each, gain = _share_out(rows - count, chances, [min(limit, cap) for limit in limits])
                if not any(each):
                    continue
                if (rate := (count + gain) / self._cost(pool, rows, max(each))) > best_rate:
                    best, best_rate = (rows, each), rate
        return best

    def learn(self, record: DraftRecord, asked: int, outcomes: Rows[bool | None]) -> None:
        """A step with `asked` guesses was read.

        outcomes: of each token that it gave, whether the guess was right; None where there was none.
        """
        stand = len(outcomes) - 1
        for each in (record, self.total):
            each.count(asked if outcomes[-1] is not None else stand, stand)
        chance = self._chance(record)
        for outcome in outcomes:
            if outcome is None and not self._is_free:
                chance += RETRY * (self._first_chance - chance)
            else:
                chance += LEARNING_RATE * (bool(outcome) - chance)
                if not self._is_free:  # a text says nothing of others; a model is as good for all
                    self._usual += COMMON_RATE * (bool(outcome) - self._usual)
        record.chance = chance

    def took(self, pool: int, rows: int, most: int, seconds: float) -> None:
        """A step of so many rows, of which one sequence had `most` guesses, took so long."""
        kind = self._kind(pool, rows, most)
        self._seconds.setdefault(kind, deque(maxlen=KEPT)).append(seconds)
        self._steps += 1
        if self._steps % FORGET:
            return
        for other, seen in self._seconds.items():
            if other != kind and seen:
                seen.popleft()

    def _chance(self, record: DraftRecord) -> float:
        return self._usual if record.chance is None else record.chance

    def _caps(self) -> list[int]:
        """Longest drafts to choose from: where guesses are free, their number alone counts."""
        shorter = () if self._is_free else (c for c in (1, 2, 3, 4, 6, 8, 12, 16) if c < self._most)
        return [*shorter, self._most]

    def _kind(self, pool: int, rows: int, most: int) -> tuple[int, int, int]:
        return pool, rows, 0 if self._is_free else most

    def _cost(self, pool: int, rows: int, most: int) -> float:
        """Seconds of such a step: measured, or expected from those that were."""
        kind = self._kind(pool, rows, most)
        expected = _expected(*kind[1:]) * self._pace()
        seen = self._seconds.get(kind, ())
        if not seen:
            return expected
        return min(seen) if len(seen) >= TRUSTED else min(expected, *seen)

    def _pace(self) -> float:
        """Seconds of a step by those measured, in units of what is expected."""
        times = [(rows, most, min(seen)) for (_, rows, most), seen in self._seconds.items() if seen]
        ratios = [fastest / _expected(rows, most) for rows, most, fastest in times]
        return min(ratios, default=1.0)


def _expected(rows: int, most: int) -> float:
    """What a step may cost, in units of reading the weights once: a processor soon has enough to do."""
    return 1 + rows / 8 + 0.15 * most


def _share_out(spare: int, chances: list[float], limits: list[int]) -> tuple[list[int], float]:
    """So many rows given to the likeliest guesses: how many each sequence has, and the tokens expected."""
    worth = sorted(
        (-(chance**j), j, i)
        for i, (chance, limit) in enumerate(zip(chances, limits, strict=True))
        for j in range(1, limit + 1)
        if chance > 0
    )[:spare]
    each, gain = [0] * len(chances), 0.0
    for minus, _, i in worth:
        each[i] += 1
        gain -= minus
    return each, gain
