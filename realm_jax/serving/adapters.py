"""Which adapter stands in which slot of the bank. Plain Python: no JAX.

Slot 0 is no adapter's. An adapter that running sequences use stays; of the others, the one used longest ago
gives way.
"""

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LoadAdapter:
    """The adapter of this name comes into a slot of the bank."""

    name: str
    slot: int


@dataclass(eq=False)
class _Slot:
    name: str | None = None
    users: int = 0
    used: int = 0  # a count that grows


class AdapterSlots:
    """The slots of a bank for `count` adapters."""

    def __init__(self, count: int) -> None:
        self._loads: deque[LoadAdapter] = deque()
        self._slots = {index: _Slot() for index in range(1, count + 1)}
        self._clock = itertools.count(1)

    @property
    def standing(self) -> list[LoadAdapter]:
        """What stands in the bank, as it would be loaded anew."""
        return [LoadAdapter(slot.name, i) for i, slot in self._slots.items() if slot.name is not None]

    def index_of(self, name: str) -> int | None:
        """The slot of an adapter, None where it has none."""
        return next((i for i, slot in self._slots.items() if slot.name == name), None)

    def next_load(self) -> LoadAdapter | None:
        """What must be loaded before anything else runs; each is said once."""
        return self._loads.popleft() if self._loads else None

    def acquire(self, names: Iterable[str]) -> bool:
        """Whether there is room: then the adapters are held, and those that are missing will be loaded."""
        wanted = list(dict.fromkeys(names))
        missing = [name for name in wanted if self.index_of(name) is None]
        idle = [i for i, slot in self._slots.items() if not slot.users and slot.name not in wanted]
        if len(idle) < len(missing):
            return False
        idle.sort(key=lambda i: self._slots[i].used)
        for name, index in zip(missing, idle, strict=False):
            self._slots[index].name = name
            self._loads.append(LoadAdapter(name, index))
        for name in wanted:
            slot = self._named(name)
            slot.users += 1
            slot.used = next(self._clock)
        return True

    def release(self, names: Iterable[str]) -> None:
        """One user less of each."""
        for name in dict.fromkeys(names):
            self._named(name).users -= 1

    def clear(self) -> None:
        """Nothing stands in the bank, and nobody uses it."""
        self._loads.clear()
        self._slots = {index: _Slot() for index in self._slots}

    def load_again(self) -> None:
        """All that should stand in the bank will be loaded before anything else runs."""
        self._loads = deque(self.standing)

    def forget(self, name: str) -> None:
        """The adapter has no slot any more, and will not be loaded; nobody uses it."""
        self._loads = deque(load for load in self._loads if load.name != name)
        if (index := self.index_of(name)) is not None:
            assert not self._slots[index].users
            self._slots[index] = _Slot()

    def _named(self, name: str) -> _Slot:
        index = self.index_of(name)
        assert index is not None, f"{name} is not held"
        return self._slots[index]
