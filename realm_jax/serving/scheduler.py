"""Decides what the device does next. Plain Python: no JAX, no I/O, no clock.

Tenants take turns (`FairQueue`); a tenant's sequences wait by priority, then in order of arrival. One that is
let in takes a slot of the smallest pool that fits its prompt; tiles of the prompt that another slot holds are
copied, the rest is prefilled, several prompts in one call, cut at multiples of `TILE` whatever runs beside
it. Then it decodes with all others of its pool, and moves up to the next pool when it has filled its slot. A
slot that is taken gives what it holds to the free one that is least worth: of reusable prompts the one used
longest ago is lost. Prefill and decode take turns, so that running sequences wait for one prefill call at
most between steps, and prompts for one step between calls. A sequence whose answer must have a form misses
the step in which its last token is not yet read: what may follow it is not yet known.
"""

import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Rows

from realm_jax.buckets import Buckets
from realm_jax.config import TILE
from realm_jax.errors import CapacityError, RequestError
from realm_jax.serving.adapters import AdapterSlots
from realm_jax.serving.drafting import Drafting, DraftRecord
from realm_jax.serving.fairness import FairQueue
from realm_jax.serving.plans import Copy, Decode, Plan, Prefill, Tile
from realm_jax.serving.request import FinishReason, Request, Sequence
from realm_jax.serving.slots import Slot, Slots


class Scheduler:
    """Owns the slots of all pools and the order of work."""

    def __init__(
        self,
        buckets: Buckets,
        context: int,
        *,
        max_queue: int | None = None,
        max_loras: int = 0,
        prefix_caching: bool = True,
        drafting: Drafting | None = None,
    ) -> None:
        self.buckets = buckets
        self.drafting = drafting
        self.context = context
        self.slots = Slots(buckets)
        self.adapters = AdapterSlots(max_loras)
        self._max_queue = max_queue
        self._prefix_caching = prefix_caching
        self.queue = FairQueue(min(buckets.max_num_seqs, sum(pool.slots for pool in buckets.pools)))
        self._prefilling: list[Sequence] = []  # by admission
        self._copies: deque[Copy] = deque()  # decided, and not yet returned
        self._next_pool = 0
        self._prefill_is_next = True

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return self.queue.num_waiting

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0 or any(self.slots.taken())

    def add(self, request: Request) -> list[Sequence]:
        """The request waits as `n` sequences.

        Raises RequestError if the prompt is empty or does not leave room for one token, CapacityError if
        too many wait, of the tenant, too: by weights, each has a share of the queue.
        """
        length, most = len(request.prompt_ids), request.params.max_tokens
        if not 0 < request.weight < math.inf:
            raise RequestError(f"weight is {request.weight}; give a number above 0")
        if not length:
            raise RequestError("prompt is empty; give at least one token")
        if length + (most != 0) > self.context:
            raise RequestError(
                f"prompt is {length:,} tokens; the context is {self.context:,} and must hold one more "
                "(raise --ctx-size)"
            )
        count = request.params.n
        self._check_queue(request, count)
        room = self.context - length
        new_tokens = room if most is None else min(most, room)
        sequences = [Sequence(request, index, new_tokens) for index in range(count)]
        for sequence in sequences if self.drafting is not None else ():
            sequence.drafts = DraftRecord()
        for sequence in sequences:
            self.queue.push(sequence)
        return sequences

    def schedule(self) -> Plan | None:
        """The next thing to do, counted as dispatched; None while nothing can run."""
        self.queue.tick()
        if not self._copies:
            self._move()
        if not self._copies:
            self._admit()
        if self._copies:
            return self._copies.popleft()
        if (load := self.adapters.next_load()) is not None:
            return load
        order = (self._prefill, self._decode) if self._prefill_is_next else (self._decode, self._prefill)
        for attempt in order:
            if (plan := attempt()) is not None:
                self._prefill_is_next = not isinstance(plan, Prefill)
                return plan
        return None

    def commit(self, sequence: Sequence, tokens: Rows[int], stop_ids: Iterable[int]) -> list[int]:
        """Append read tokens up to the sequence's end; returns those that count.

        A sequence that ended already takes none: its row ran one step more than was known to be needed.
        """
        taken: list[int] = []
        stops = frozenset(stop_ids)
        for token in tokens:
            if sequence.finish_reason is not None or len(sequence.token_ids) >= sequence.max_new_tokens:
                break
            taken.append(token)
            sequence.token_ids.append(token)
            if token in stops:
                self.finish(sequence, FinishReason.STOP)
        if taken:
            self.queue.charge(sequence, output=len(taken))
        if len(sequence.token_ids) >= sequence.max_new_tokens:
            self.finish(sequence, FinishReason.LENGTH)
        return taken

    def settle(self, sequence: Sequence, asked: int, outcomes: Rows[bool | None]) -> None:
        """A step with `asked` rows of the sequence was read: what was guessed of each token that it gave."""
        sequence.dispatched -= asked - len(outcomes)
        if self.drafting is not None and sequence.drafts is not None:
            self.drafting.learn(sequence.drafts, asked - 1, outcomes)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence has ended; its slot is free. Without effect on one that ended before."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        self.queue.leave(sequence)
        if (slot := self._slot_of(sequence)) is not None:
            self.slots.release(slot)
            self.adapters.release(sequence.request.adapter_names)
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)

    def forget(self) -> None:
        """Nothing stands in any slot: the device's memory was lost, or written to."""
        self._copies.clear()
        self.slots.forget()

    def _check_queue(self, request: Request, count: int) -> None:
        if self._max_queue is None:
            return
        if count > (most := self._max_queue + self.buckets.max_num_seqs):
            raise RequestError(f"n is {count}; max_queue and max_num_seqs allow {most} sequences at once")
        room = max(self.buckets.max_num_seqs - sum(1 for _ in self.slots.taken()), 0)
        share = self.queue.room(request.tenant, request.weight, self._max_queue)
        if self.num_waiting + count > self._max_queue + room and count > share:
            raise CapacityError(
                f"the queue is full: {self.num_waiting:,} sequences wait and max_queue is "
                f"{self._max_queue:,}; try again later"
            )

    def _slot_of(self, sequence: Sequence) -> Slot | None:
        if sequence.pool is None or sequence.slot is None:
            return None
        return self.slots[sequence.pool][sequence.slot]

    def _admit(self) -> None:
        """Waiting sequences have slots, as many as the next prefill call serves or until one needs copies."""
        most = max(tiles for pool in self.buckets.pools for tiles in pool.tiles)
        while not self._copies and sum(s.tiles_left for s in self._prefilling) < most:
            if (found := self._next()) is None:
                return
            sequence, free = found
            self.queue.admit(sequence)
            self._prefilling.append(sequence)
            self._begin(sequence, free)
            self.queue.charge(sequence, prompt=sequence.prompt_length - sequence.reused)

    def _next(self) -> tuple[Sequence, list[Slot]] | None:
        """The first candidate that fits, its adapters held, and the slots that it may take."""
        for sequence in self.queue.candidates():
            if (free := self._place_for(sequence)) is not None and self._hold_adapters(sequence):
                return sequence, free
        return None

    def _place_for(self, sequence: Sequence) -> list[Slot] | None:
        """Free slots of the smallest pool that holds the prompt and, if one is wanted, a token more."""
        if sum(1 for _ in self.slots.taken()) >= self.buckets.max_num_seqs:
            return None
        needed = sequence.prompt_length + (sequence.max_new_tokens > 0)
        for i, pool in enumerate(self.buckets.pools):
            if pool.capacity >= needed and (free := self.slots.free(i)):
                return free
        return None

    def _hold_adapters(self, sequence: Sequence) -> bool:
        """Whether the bank has its adapters, or will have before anything else runs."""
        names = sequence.request.adapter_names
        if not self.adapters.acquire(names):
            return False
        sequence.bank_slots = tuple(self.adapters.index_of(name) or 0 for name in names)
        return True

    def _begin(self, sequence: Sequence, free: list[Slot]) -> None:
        """The sequence holds one of these slots, with all of its prompt that was computed before."""
        request, target = sequence.request, free[0]
        source = self.slots.prefix_of(request, target.pool) if self._prefix_caching else None
        tiles = source.shared_tiles(request) if source is not None else 0
        if source is not None:  # best is a free slot that holds as much: nothing to copy
            target = next((slot for slot in free if slot.shared_tiles(request) == tiles), target)
            source = None if target.shared_tiles(request) == tiles else source
        self._keep(target, request, source)
        self.slots.take(target, sequence, tiles)
        sequence.prefilled = sequence.reused = tiles * TILE
        if source is None:
            return
        self._copies.append(Copy(source.pool, source.index, target.pool, target.index, tiles))
        if source.sequence is None and source.pool == target.pool and source.is_start_of(request):
            source.tiles = 0  # nothing that does not stand in the target, too

    def _keep(self, target: Slot, request: Request, source: Slot | None) -> None:
        """What stands in the slot that this request takes also stands in the free slot that is least worth.

        It is lost if that is the slot itself, and not kept if the prompt begins so. The source of the
        prompt's prefix is still to be read: it is not written to.
        """
        if not self._prefix_caching or target.is_start_of(request):
            return
        if (spare := self.slots.least(target.pool, but=source)) is not target:
            self._copies.append(Copy(target.pool, target.index, target.pool, spare.index, target.tiles))
            self.slots.transfer(target, spare)

    def _prefill(self) -> Prefill | None:
        """The first tiles of the pool whose prompt came first."""
        if not self._prefilling or (pool := self._prefilling[0].pool) is None:
            return None
        mine = [sequence for sequence in self._prefilling if sequence.pool == pool]
        rows = self.buckets.pools[pool].tiles_for(sum(sequence.tiles_left for sequence in mine))
        tiles: list[Tile] = []
        for sequence in mine:
            while len(tiles) < rows and not sequence.is_prefilled:
                tiles.append(self._next_tile(sequence))
        self._prefilling = [sequence for sequence in self._prefilling if not sequence.is_prefilled]
        return Prefill(pool, rows, tuple(tiles))

    def _next_tile(self, sequence: Sequence) -> Tile:
        start = sequence.prefilled
        tokens = sequence.request.prompt_ids[start : start + TILE]
        sequence.prefilled += len(tokens)
        slot = self._slot_of(sequence)
        assert slot is not None
        slot.tiles = sequence.prefilled // TILE  # of a partial tile, decoding overwrites the rest
        if sequence.is_prefilled:
            sequence.dispatched = min(sequence.max_new_tokens, 1)
        return Tile(sequence, slot.index, start, tokens, sequence.is_prefilled)

    def _decode(self) -> Decode | None:
        """A step of the next pool, in turn, that has a sequence to advance."""
        count = len(self.buckets.pools)
        for offset in range(count):
            pool = (self._next_pool + offset) % count
            held = [slot.sequence for slot in self.slots[pool]]
            ready = [s if s is not None and self._can_step(s, pool) else None for s in held]
            if not any(ready) or _gathers(held, ready):
                continue
            self._next_pool = (pool + 1) % count
            rows, chosen = self._rows(pool, ready)
            for sequence in chosen:
                if sequence is not None:
                    sequence.dispatched += 1
            return Decode(pool, rows, chosen)
        return None

    def _rows(self, pool: int, ready: list[Sequence | None]) -> tuple[int, tuple[Sequence | None, ...]]:
        """How many rows a step of these has, which stand by slot, and whose they are."""
        shape = self.buckets.pools[pool]
        if self.drafting is None:
            used = max(i + 1 for i, sequence in enumerate(ready) if sequence is not None)
            return (rows := shape.rows_for(used)), tuple(ready[:rows])
        some = [(s, s.drafts) for s in ready if s is not None and s.drafts is not None]
        rooms = [_room(s, shape.capacity) for s, _ in some]
        rows, drafts = self.drafting.lengths(pool, shape, [record for _, record in some], rooms)
        chosen = tuple(s for (s, _), count in zip(some, drafts, strict=True) for _ in range(1 + count))
        return rows, chosen + (None,) * (rows - len(chosen))

    def _can_step(self, sequence: Sequence, pool: int) -> bool:
        return not sequence.awaits_mask and self._fits_step(sequence, pool)

    def _fits_step(self, sequence: Sequence, pool: int) -> bool:
        return sequence.wants_step and sequence.cached < self.buckets.pools[pool].capacity

    def _move(self) -> None:
        """The first sequence that filled its slot goes on in the next larger pool, if that has room."""
        for pool in range(len(self.buckets.pools) - 1):
            if not (free := self.slots.free(pool + 1)):
                continue
            for slot in sorted(self.slots[pool], key=lambda slot: slot.used):  # else the last ones starve
                sequence = slot.sequence
                if sequence is not None and sequence.wants_step and not self._fits_step(sequence, pool):
                    self._keep(free[0], sequence.request, None)
                    tiles = -(-sequence.cached // TILE)
                    self._copies.append(Copy(pool, slot.index, pool + 1, free[0].index, tiles))
                    self.slots.take(free[0], sequence, slot.tiles)
                    self.slots.release(slot)
                    return


def _room(sequence: Sequence, capacity: int) -> int:
    """How many guesses a step may verify: of an answer with a form none, for lack of their masks."""
    if sequence.matcher is not None:
        return 0
    return min(sequence.max_new_tokens - sequence.dispatched, capacity - sequence.cached) - 1


def _gathers(held: list[Sequence | None], ready: list[Sequence | None]) -> bool:
    """Whether a step of these would be without others that only wait to be read: all have forms.

    Else these and those would take turns, each in steps that are half empty.
    """
    waits = any(s is not None and s.awaits_mask and s.wants_step for s in held)
    return waits and all(s is None or s.matcher is not None for s in ready)
