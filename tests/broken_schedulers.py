"""Schedulers with one fault each, which the search for a scenario must find; those of slots are next door."""

import heapq
from collections.abc import Iterable
from dataclasses import replace

import broken_slots
from scenarios import MAX_LORAS, Scenario
from simulation import scheduler_of

from realm_jax.config import TILE
from realm_jax.errors import CapacityError
from realm_jax.serving.adapters import AdapterSlots, LoadAdapter
from realm_jax.serving.plans import Copy, Decode, Plan, Prefill, Tile
from realm_jax.serving.request import FinishReason, Request, Sequence
from realm_jax.serving.scheduler import Scheduler
from realm_jax.serving.slots import Slot, Slots


class Leaks(Scheduler):
    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.slot is None or sequence.finish_reason is not None or reason is not FinishReason.STOP:
            return super().finish(sequence, reason)
        sequence.finish_reason = reason
        return None


class EndsTwice(Scheduler):
    """An abort of a sequence that has ended frees whatever holds its slot now."""

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.finish_reason is not None and (slot := self._slot_of(sequence)) is not None:
            self.slots.release(slot)
        super().finish(sequence, reason)


class ForgetsPrefill(Scheduler):
    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        kept = list(self._prefilling)
        super().finish(sequence, reason)
        self._prefilling = kept


class Overflows(Scheduler):
    def _fits_step(self, sequence: Sequence, pool: int) -> bool:
        return sequence.wants_step and sequence.cached <= self.buckets.pools[pool].capacity


class PromptsFirst(Scheduler):
    def schedule(self) -> Plan | None:
        self._prefill_is_next = True
        return super().schedule()


class StepsFirst(Scheduler):
    def schedule(self) -> Plan | None:
        self._prefill_is_next = False
        return super().schedule()


class NeverMoves(Scheduler):
    def _move(self) -> None:
        return


class FirstPoolFirst(Scheduler):
    def _decode(self) -> Decode | None:
        self._next_pool = 0
        return super()._decode()


class Crowds(Scheduler):
    def _place_for(self, sequence: Sequence) -> list[Slot] | None:
        most, self.buckets = self.buckets, replace(self.buckets, max_num_seqs=1000)
        try:
            return super()._place_for(sequence)
        finally:
            self.buckets = most


class LetsInTooMany(Scheduler):
    """Prompts get slots long before they can be computed, and miss what those before them compute."""

    def _admit(self) -> None:
        prefilling, self._prefilling = self._prefilling, []
        try:
            super()._admit()
        finally:
            self._prefilling = prefilling + self._prefilling


class IgnoresPriority(Scheduler):
    def add(self, request: Request) -> list[Sequence]:
        sequences = super().add(request)
        for account in self.queue._accounts.values():
            account.line = [(0, order, sequence) for _, order, sequence in account.line]
            heapq.heapify(account.line)
        return sequences


class PassesOver(Scheduler):
    """Where the first that waits does not fit, the second is let in."""

    def _admit(self) -> None:
        for account in self.queue._accounts.values():
            live = sorted(each for each in account.line if each[2].finish_reason is None)
            if len(live) > 1 and self._place_for(live[0][2]) is None:
                (second, first, later), (_, _, sooner) = live[1], live[0]
                account.line = [(second, live[0][1], later), (second, first, sooner), *live[2:]]
                heapq.heapify(account.line)
        super()._admit()


class CountsTheQueueWrong(Scheduler):
    def _check_queue(self, request: Request, count: int) -> None:
        super()._check_queue(request, count - 1)


class RefusesWhileSlotsAreFree(Scheduler):
    def _check_queue(self, request: Request, count: int) -> None:
        if self._max_queue is not None and self.num_waiting + count > self._max_queue:
            raise CapacityError("the queue is full")


class CountsTheAborted(Scheduler):
    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        was_waiting = sequence.finish_reason is None and sequence.slot is None
        super().finish(sequence, reason)
        self.queue.num_waiting += was_waiting


class CutsToFill(Scheduler):
    """A tile is as long as the call has room, where prompts run side by side."""

    def _next_tile(self, sequence: Sequence) -> Tile:
        tile = super()._next_tile(sequence)
        if len(self._prefilling) < 2 or len(tile.tokens) < TILE:
            return tile
        sequence.prefilled -= TILE // 2
        sequence.dispatched = 0
        return replace(tile, tokens=tile.tokens[: TILE // 2], is_last=False)


class PadsMore(Scheduler):
    def _prefill(self) -> Prefill | None:
        plan = super()._prefill()
        return None if plan is None else replace(plan, rows=self.buckets.pools[plan.pool].tiles[-1])


class ShortestPromptFirst(Scheduler):
    def _prefill(self) -> Prefill | None:
        self._prefilling.sort(key=lambda sequence: sequence.tiles_left)
        return super()._prefill()


class EndsOnlyWithATile(Scheduler):
    """A prompt that only is scored takes a step when it has been computed."""

    def _next_tile(self, sequence: Sequence) -> Tile:
        tile = super()._next_tile(sequence)
        sequence.max_new_tokens = max(sequence.max_new_tokens, 1)
        return tile


class AlwaysReuses(Scheduler):
    def _begin(self, sequence: Sequence, free: list[Slot]) -> None:
        self._prefix_caching = True
        super()._begin(sequence, free)


class ForgetsToCopy(Scheduler):
    """A prefix counts as reused, and is not copied."""

    def _begin(self, sequence: Sequence, free: list[Slot]) -> None:
        super()._begin(sequence, free)
        self._copies.clear()


class LosesWhatStood(Scheduler):
    """A slot is taken without a look at what it holds, however many others stand empty."""

    def _keep(self, target: Slot, request: Request, source: Slot | None) -> None:
        return


class KeepsWhatItWillHave(Scheduler):
    """A prompt that goes on from what its slot holds has that copied aside."""

    def _keep(self, target: Slot, request: Request, source: Slot | None) -> None:
        super()._keep(target, replace(request, prompt_ids=()), source)


class KeepsOverTheSource(Scheduler):
    """The prefix that a prompt reuses may be overwritten before it is copied."""

    def _keep(self, target: Slot, request: Request, source: Slot | None) -> None:
        super()._keep(target, request, None)


class KeepsTwice(Scheduler):
    """A prefix that moved to another slot also keeps the one it had."""

    def _begin(self, sequence: Sequence, free: list[Slot]) -> None:
        before = {slot: slot.tiles for slots in self.slots._pools for slot in slots}
        super()._begin(sequence, free)
        copy = self._copies[-1] if self._copies else None
        if copy is not None and copy.from_pool == copy.to_pool:
            source = self.slots[copy.from_pool][copy.from_slot]
            source.tiles = source.tiles or before[source]


class CopiesLess(Scheduler):
    """Of a slot that a sequence leaves, only its prompt is copied."""

    def _move(self) -> None:
        super()._move()
        if self._copies:
            copy = self._copies.pop()
            self._copies.append(replace(copy, tiles=self.slots[copy.to_pool][copy.to_slot].tiles))


class MovesTheLatest(Scheduler):
    """A sequence that filled its slot waits for those that came later."""

    def _move(self) -> None:
        for source, slots in enumerate(self.slots._pools[:-1]):
            for slot in sorted(slots, key=lambda slot: -slot.used):
                sequence, free = slot.sequence, self.slots.free(source + 1)
                if free and sequence and sequence.wants_step and not self._fits_step(sequence, source):
                    self._keep(free[0], sequence.request, None)
                    tiles = self.buckets.pools[source].capacity // TILE
                    self._copies.append(Copy(source, slot.index, source + 1, free[0].index, tiles))
                    self.slots.take(free[0], sequence, slot.tiles)
                    self.slots.release(slot)
                    return


class LeaksAdapters(AdapterSlots):
    """An adapter that was used by two at once stays held."""

    def release(self, names: Iterable[str]) -> None:
        super().release(name for name in names if self._named(name).users == 1)


class LoadsOverOthers(AdapterSlots):
    def release(self, names: Iterable[str]) -> None:
        super().release(names)
        for slot in self._slots.values():
            slot.users = min(slot.users, 0)


class NeverLoads(Scheduler):
    def schedule(self) -> Plan | None:
        while isinstance(plan := super().schedule(), LoadAdapter):
            pass
        return plan


Fault = type[Scheduler] | type[Slots] | type[Slot] | type[AdapterSlots]
FAULTS: list[Fault] = [
    fault
    for module in (globals(), vars(broken_slots))
    for fault in list(module.values())
    if isinstance(fault, type) and fault.__module__ == module["__name__"]
]


def broken(fault: Fault, scenario: Scenario) -> Scheduler:
    """A scheduler for the scenario with this fault."""
    kind = fault if issubclass(fault, Scheduler) else Scheduler
    scheduler = scheduler_of(scenario, kind)
    if issubclass(fault, Slots):
        scheduler.slots = fault(scheduler.buckets)
    if issubclass(fault, AdapterSlots):
        scheduler.adapters = fault(MAX_LORAS)
    if issubclass(fault, Slot):
        pools = enumerate(scheduler.buckets.pools)
        scheduler.slots._pools = [[fault(i, j) for j in range(pool.slots)] for i, pool in pools]
    return scheduler
