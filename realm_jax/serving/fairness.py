"""Who is let in next: fair between tenants, by priority and arrival within one. Plain Python, no clock.

Each tenant has a virtual time: the tokens it was served, divided by its weight, one that was generated
counted as `OUTPUT_COST` of a prompt. The one that is behind goes first, so those who wait are served by their
weights. A tenant that comes anew is set to where the others are: idle time earns nothing, and what was used
while nobody waited costs nothing. (Virtual token counters: Sheng et al., Fairness in Serving Large Language
Models, 2024.)

Slots come free only as sequences end. So a few are kept from tenants that hold their share or more, one for
each tenant that ran within the last `LINGER` calls and has nothing here now: its next request starts at once.
"""

import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from realm_jax.serving.request import Sequence

OUTPUT_COST = 2
"""A generated token takes a step; those of a prompt share calls."""

LINGER = 1024
"""Calls for which a slot is kept for a tenant that ran: a minute or so."""

KEPT = 8
"""One slot in so many may be kept; the others are never free while somebody waits."""


@dataclass(eq=False)
class _Account:
    """One tenant: the mutable record."""

    weight: float = 1.0
    served: float = 0.0  # its virtual time
    line: list[tuple[int, int, Sequence]] = field(default_factory=list)  # a heap
    waiting: int = 0  # the line's without those that ended
    running: int = 0
    passed: int = 0  # others that were let in while the first here did not fit
    ran_at: int = -LINGER  # the call at which its last sequence ended

    @property
    def first(self) -> Sequence:
        return self.line[0][2]

    @property
    def turn(self) -> tuple[float, float, int]:
        """The least is let in first."""
        return self.served, self.running / self.weight, self.line[0][1]


class FairQueue:
    """Sequences that wait for one of `slots` slots, and what each tenant was served."""

    def __init__(self, slots: int) -> None:
        self.num_waiting = 0
        self._slots = slots
        self._accounts: dict[str, _Account] = {}
        self._num_added = 0
        self._calls = 0

    def push(self, sequence: Sequence) -> None:
        """The sequence waits behind its tenant's of the same priority."""
        request = sequence.request
        account = self._accounts.setdefault(request.tenant, _Account())
        account.weight = request.weight
        if not account.waiting:
            account.served = max(account.served, self._floor())
        heapq.heappush(account.line, (request.priority, self._num_added, sequence))
        self._num_added += 1
        account.waiting += 1
        self.num_waiting += 1

    def candidates(self) -> Iterator[Sequence]:
        """Who may be let in now, by turn: of each tenant the first, where no slot is kept from it.

        One that does not fit lets others pass, as often as there are slots: then it is the last one here.
        """
        for account in sorted(self._waiting(), key=lambda account: account.turn):
            if self._may_grow(account):
                yield account.first
                if account.passed >= self._slots:
                    return

    def admit(self, sequence: Sequence) -> None:
        """One of the candidates has a slot; those before it were passed over."""
        for other in itertools.takewhile(lambda each: each is not sequence, self.candidates()):
            self._of(other).passed += 1
        account = self._of(sequence)
        assert account.first is sequence
        heapq.heappop(account.line)
        self._drop_ended(account)
        account.passed = 0
        account.running += 1
        account.waiting -= 1
        self.num_waiting -= 1

    def charge(self, sequence: Sequence, prompt: int = 0, output: int = 0) -> None:
        """The tenant was served these tokens: computed of a prompt, and generated."""
        account = self._of(sequence)
        account.served += (prompt + OUTPUT_COST * output) / account.weight

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended that waited or ran."""
        account = self._of(sequence)
        if sequence.slot is None:
            account.waiting -= 1
            self.num_waiting -= 1
            self._drop_ended(account)
        else:
            account.running -= 1
            account.ran_at = self._calls

    def tick(self) -> None:
        """One call more; from time to time tenants that have long been idle are forgotten."""
        self._calls += 1
        if self._calls % LINGER == 0:
            self._accounts = {name: each for name, each in self._accounts.items() if self._is_here(each)}

    def room(self, tenant: str, weight: float, most: int) -> float:
        """How many more of the tenant's may wait, where `most` are divided among those who do, by weight."""
        account = self._accounts.get(tenant, _Account())
        others = sum(each.weight for each in self._waiting() if each is not account)
        return most * weight / (weight + others) - account.waiting

    def _of(self, sequence: Sequence) -> _Account:
        return self._accounts[sequence.request.tenant]

    def _waiting(self) -> Iterator[_Account]:
        return (account for account in self._accounts.values() if account.waiting)

    def _floor(self) -> float:
        """Where a tenant begins that comes anew: level with the last of those who wait, or with everybody."""
        waiting = [account.served for account in self._waiting()]
        return min(waiting) if waiting else max(account.served for account in self._accounts.values())

    def _is_here(self, account: _Account) -> bool:
        return bool(account.waiting or account.running) or self._calls - account.ran_at < LINGER

    def _may_grow(self, account: _Account) -> bool:
        """Whether the tenant holds less than its share, or more slots are free than are kept for others."""
        here = [each for each in self._accounts.values() if self._is_here(each)]
        if account.running < self._slots * account.weight / sum(each.weight for each in here):
            return True
        idle = sum(not (each.running or each.waiting) for each in here)  # who waits takes turns
        free = self._slots - sum(each.running for each in here)
        return free > min(idle, self._slots // KEPT)

    def _drop_ended(self, account: _Account) -> None:
        while account.line and account.first.finish_reason is not None:
            heapq.heappop(account.line)
