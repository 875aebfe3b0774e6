"""Which sequence holds which slot, and whose prompt's tiles stand in it. Plain Python: no JAX.

A slot keeps what was computed of its prompt after its sequence has ended, until another takes it: a later
prompt that begins alike, of the same tenant and adapter, reuses those tiles. So the memory of reused
prefixes is that of the slots, and what was used longest ago goes first.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from realm_jax.buckets import Buckets
from realm_jax.config import TILE
from realm_jax.serving.request import Request, Sequence


@dataclass(eq=False)
class Slot:
    """One slot of a pool: the mutable record."""

    pool: int
    index: int
    sequence: Sequence | None = None
    request: Request | None = None  # whose prompt's first `tiles` tiles stand here
    tiles: int = 0
    used: int = 0  # a count that grows: when what stands here was last used

    @property
    def worth(self) -> tuple[bool, int]:
        """The least is to be overwritten first: nothing reusable, then what was used longest ago."""
        return self.tiles > 0, self.used

    def shared_tiles(self, request: Request) -> int:
        """Tiles that stand here and are also the beginning of this request's prompt."""
        if self.request is None or self.request.owner != request.owner:
            return 0
        mine, other = self.request.prompt_ids, request.prompt_ids
        most = min(self.tiles, request.reusable // TILE)
        return next((i for i in range(most) if not _same(mine, other, i)), most)

    def is_start_of(self, request: Request) -> bool:
        """Whether all that stands here will also stand where this request's prompt has been computed."""
        if not self.tiles or self.request is None:
            return True
        end = self.tiles * TILE
        is_same = self.request.prompt_ids[:end] == request.prompt_ids[:end]
        return is_same and self.request.owner == request.owner


class Slots:
    """The slots of all pools."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._pools = [[Slot(i, j) for j in range(pool.slots)] for i, pool in enumerate(buckets.pools)]
        self._clock = itertools.count(1)

    def __getitem__(self, pool: int) -> list[Slot]:
        return self._pools[pool]

    def taken(self) -> Iterator[Slot]:
        """Slots that a sequence holds."""
        return (slot for pool in self._pools for slot in pool if slot.sequence is not None)

    def free(self, pool: int) -> list[Slot]:
        """Free slots of the lowest rows that a decode step may compute, least worth first."""
        free = [slot for slot in self._pools[pool] if slot.sequence is None]
        if not free:
            return []
        rows = self._buckets.pools[pool].rows_for(free[0].index + 1)
        return sorted((slot for slot in free if slot.index < rows), key=lambda slot: slot.worth)

    def least(self, pool: int, but: Slot | None) -> Slot:
        """The free slot of any row, but this one, that is least worth."""
        free = (slot for slot in self._pools[pool] if slot.sequence is None and slot is not but)
        return min(free, key=lambda slot: slot.worth)

    def prefix_of(self, request: Request, pool: int) -> Slot | None:
        """A slot of this pool or the one below that holds most of how the prompt begins."""
        pools = self._pools[max(pool - 1, 0) : pool + 1]
        found = [(slot.shared_tiles(request), slot) for slots in pools for slot in slots]
        tiles, slot = max(found, key=lambda each: each[0])
        return slot if tiles else None

    def take(self, slot: Slot, sequence: Sequence, tiles: int) -> None:
        """The sequence holds the slot, in which so many tiles of its prompt stand."""
        slot.sequence, slot.request, slot.tiles = sequence, sequence.request, tiles
        slot.used = next(self._clock)
        sequence.pool, sequence.slot = slot.pool, slot.index

    def transfer(self, source: Slot, target: Slot) -> None:
        """What stands in the source is the free target's, as old as it was."""
        target.request, target.tiles, target.used = source.request, source.tiles, source.used

    def release(self, slot: Slot) -> None:
        """The slot is free; what stands in it stays until it is taken."""
        slot.sequence = None
        slot.used = next(self._clock)

    def forget_adapter(self, name: str) -> None:
        """Nothing stands in the slots that was computed with the adapter."""
        for pool in self._pools:
            for slot in pool:
                if slot.request is not None and name in slot.request.adapter_names:
                    slot.tiles = 0

    def forget(self) -> None:
        """Nothing stands in any slot: the device's memory was lost, or written to."""
        for pool in self._pools:
            for slot in pool:
                slot.tiles = 0


def _same(mine: tuple[int, ...], other: tuple[int, ...], tile: int) -> bool:
    part = slice(tile * TILE, (tile + 1) * TILE)
    return mine[part] == other[part]
