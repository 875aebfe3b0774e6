"""Decides what the device does next. Plain Python: no JAX, no I/O, no clock.

Sequences wait in order of arrival, take the lowest free slot of the smallest pool that fits their prompt,
are prefilled in chunks whose boundaries depend on the request alone, then decode with all others of their
pool. One that fills its pool's capacity moves up to the next pool. Prefill and decode take turns.
"""

from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from realm_jax.config import BLOCK, Buckets
from realm_jax.errors import RequestError
from realm_jax.serving.request import FinishReason, Request, Sequence


@dataclass(frozen=True)
class Prefill:
    """A chunk of one prompt: its tokens from `start` on, padded to `bucket`."""

    sequence: Sequence
    pool: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    bucket: int
    is_last: bool


@dataclass(frozen=True)
class Decode:
    """One step of a pool's first `rows` slots; `sequences` has None where a slot is idle."""

    pool: int
    rows: int
    sequences: tuple[Sequence | None, ...]


@dataclass(frozen=True)
class Move:
    """A sequence has filled its slot and goes on in a larger pool."""

    from_pool: int
    from_slot: int
    to_pool: int
    to_slot: int


Plan = Prefill | Decode | Move


class Scheduler:
    """Owns the slots of all pools and the order of work."""

    def __init__(self, buckets: Buckets, context: int) -> None:
        self.buckets = buckets
        self.context = context
        self._slots: list[list[Sequence | None]] = [[None] * pool.slots for pool in buckets.pools]
        self._waiting: deque[Sequence] = deque()
        self._prefilling: Sequence | None = None
        self._next_pool = 0
        self._prefill_is_next = True

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or any(self._running())

    def add(self, request: Request) -> list[Sequence]:
        """The request waits as `n` sequences.

        Raises RequestError if the prompt is empty or does not leave room for one token.
        """
        length = len(request.prompt_ids)
        if not length:
            raise RequestError("prompt is empty; give at least one token")
        if length >= self.context:
            raise RequestError(
                f"prompt is {length:,} tokens; the context is {self.context:,} and must hold one more "
                "(raise --ctx-size)"
            )
        room = self.context - length
        new_tokens = min(request.params.max_tokens or room, room)
        sequences = [Sequence(request, index, new_tokens) for index in range(request.params.n)]
        self._waiting.extend(sequences)
        return sequences

    def schedule(self) -> Plan | None:
        """The next thing to do, counted as dispatched; None while nothing can run."""
        if (move := self._move()) is not None:
            return move
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
            if sequence.finish_reason is not None:
                break
            taken.append(token)
            sequence.token_ids.append(token)
            if token in stops:
                self.finish(sequence, FinishReason.STOP)
            elif len(sequence.token_ids) >= sequence.max_new_tokens:
                self.finish(sequence, FinishReason.LENGTH)
        return taken

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence has ended; its slot is free. Without effect on one that ended before."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.pool is None or sequence.slot is None:
            self._waiting.remove(sequence)
        else:
            self._slots[sequence.pool][sequence.slot] = None
        if self._prefilling is sequence:
            self._prefilling = None

    def _running(self) -> Iterable[Sequence]:
        return (sequence for slots in self._slots for sequence in slots if sequence is not None)

    def _prefill(self) -> Prefill | None:
        sequence = self._prefilling or self._admit()
        if sequence is None or sequence.pool is None or sequence.slot is None:
            return None
        start = sequence.prefilled
        tokens = sequence.request.prompt_ids[start : start + BLOCK]
        sequence.prefilled += len(tokens)
        is_last = sequence.is_prefilled
        sequence.dispatched = int(is_last)
        self._prefilling = None if is_last else sequence
        bucket = self.buckets.chunk_for(len(tokens))
        return Prefill(sequence, sequence.pool, sequence.slot, start, tokens, bucket, is_last)

    def _admit(self) -> Sequence | None:
        """The first waiting sequence, in the smallest pool that holds its prompt and one token more."""
        if not self._waiting or sum(1 for _ in self._running()) >= self.buckets.max_num_seqs:
            return None
        needed = self._waiting[0].prompt_length + 1
        fitting = (i for i, pool in enumerate(self.buckets.pools) if pool.capacity >= needed)
        for pool in fitting:
            if (slot := self._free_slot(pool)) is not None:
                sequence = self._waiting.popleft()
                self._place(sequence, pool, slot)
                return sequence
        return None

    def _decode(self) -> Decode | None:
        """A step of the next pool, in turn, that has a sequence to advance."""
        count = len(self.buckets.pools)
        for offset in range(count):
            pool = (self._next_pool + offset) % count
            slots = self._slots[pool]
            ready = [s if s is not None and self._fits_step(s, pool) else None for s in slots]
            used = max((i + 1 for i, s in enumerate(ready) if s is not None), default=0)
            if not used:
                continue
            self._next_pool = (pool + 1) % count
            rows = self.buckets.pools[pool].rows_for(used)
            chosen = tuple(ready[:rows])
            for sequence in chosen:
                if sequence is not None:
                    sequence.dispatched += 1
            return Decode(pool, rows, chosen)
        return None

    def _fits_step(self, sequence: Sequence, pool: int) -> bool:
        return sequence.wants_step and sequence.cached < self.buckets.pools[pool].capacity

    def _move(self) -> Move | None:
        """The first sequence that filled its slot, if the next larger pool has room."""
        for pool, slots in enumerate(self._slots[:-1]):
            if (free := self._free_slot(pool + 1)) is None:
                continue
            for slot, sequence in enumerate(slots):
                if sequence is not None and sequence.wants_step and not self._fits_step(sequence, pool):
                    slots[slot] = None
                    self._place(sequence, pool + 1, free)
                    return Move(pool, slot, pool + 1, free)
        return None

    def _free_slot(self, pool: int) -> int | None:
        return next((i for i, held in enumerate(self._slots[pool]) if held is None), None)

    def _place(self, sequence: Sequence, pool: int, slot: int) -> None:
        self._slots[pool][slot] = sequence
        sequence.pool, sequence.slot = pool, slot
