"""Slots with one fault each, which the search for a scenario must find, too."""

from dataclasses import replace

from realm_jax.config import TILE
from realm_jax.serving.request import Request, Sequence
from realm_jax.serving.slots import Slot, Slots


class IgnoresTenant(Slot):
    def shared_tiles(self, request: Request) -> int:
        own = self.request or request
        return super().shared_tiles(replace(request, tenant=own.tenant))


class IgnoresAdapter(Slot):
    def shared_tiles(self, request: Request) -> int:
        own = self.request or request
        return super().shared_tiles(replace(request, adapters=own.adapters))


class IgnoresScoreFrom(Slot):
    def shared_tiles(self, request: Request) -> int:
        return super().shared_tiles(replace(request, params=replace(request.params, prompt_logprobs=None)))


class ReusesAll(Slot):
    """Where a prompt ends with a tile, nothing of it is left to compute."""

    def shared_tiles(self, request: Request) -> int:
        if request.params.prompt_logprobs is None:
            request = replace(request, prompt_ids=(*request.prompt_ids, -1))
        return super().shared_tiles(request)


class ReusesPartialTiles(Slot):
    """A tile that a prompt began counts as a whole one: decoding wrote the rest."""

    def shared_tiles(self, request: Request) -> int:
        shared = super().shared_tiles(request)
        mine = () if self.request is None else self.request.prompt_ids
        if shared and shared == len(mine) // TILE and mine == request.prompt_ids[: len(mine)]:
            return min(-(-len(mine) // TILE), request.reusable // TILE)
        return shared


class ReusesDecoded(Slots):
    """What decoding wrote after a prompt counts as computed, too."""

    def release(self, slot: Slot) -> None:
        if (sequence := slot.sequence) is not None and slot.request is not None and sequence.is_prefilled:
            ids = (*slot.request.prompt_ids, *sequence.token_ids)
            slot.request = replace(slot.request, prompt_ids=ids)
            slot.tiles = max(slot.tiles, sequence.cached // TILE)
        super().release(slot)


class KeepsTheOverwritten(Slots):
    """A slot remembers the longest prompt that stood in it, though a later one overwrites some of that."""

    def take(self, slot: Slot, sequence: Sequence, tiles: int) -> None:
        before, stood = slot.request, slot.tiles
        super().take(slot, sequence, tiles)
        if before is not None and tiles and stood > tiles:
            slot.request, slot.tiles = before, stood


class Remembers(Slots):
    """What was lost counts as there."""

    def forget(self) -> None:
        return


class TakesTheLatest(Slots):
    def free(self, pool: int) -> list[Slot]:
        return super().free(pool)[::-1]


class TakesAnyRow(Slots):
    """The slot least worth is taken wherever it stands, so that steps compute more rows."""

    def free(self, pool: int) -> list[Slot]:
        free = [slot for slot in self[pool] if slot.sequence is None]
        return sorted(free, key=lambda slot: slot.worth)


class LosesTheLatest(Slots):
    def least(self, pool: int, but: Slot | None) -> Slot:
        free = [slot for slot in self[pool] if slot.sequence is None and slot is not but]
        return max(free, key=lambda slot: (not slot.tiles, slot.used))


class ForgetsTheAge(Slots):
    """A prefix that was copied aside counts as used just now."""

    def transfer(self, source: Slot, target: Slot) -> None:
        super().transfer(source, target)
        target.used = next(self._clock)


class LooksInOnePool(Slots):
    def prefix_of(self, request: Request, pool: int) -> Slot | None:
        found = super().prefix_of(request, pool)
        return found if found is not None and found.pool == pool else None


class TakesTheFirstFound(Slots):
    """A prefix is reused, not the longest."""

    def prefix_of(self, request: Request, pool: int) -> Slot | None:
        pools = self._pools[max(pool - 1, 0) : pool + 1]
        return next((slot for slots in pools for slot in slots if slot.shared_tiles(request)), None)
