"""What the scheduler decides that the device does next. Plain Python: no JAX."""

from dataclasses import dataclass

from realm_jax.serving.adapters import LoadAdapter
from realm_jax.serving.request import Sequence


@dataclass(frozen=True)
class Tile:
    """Up to `TILE` tokens of one prompt, from `start` on."""

    sequence: Sequence
    slot: int
    start: int
    tokens: tuple[int, ...]
    is_last: bool


@dataclass(frozen=True)
class Prefill:
    """A call of `rows` tiles, of which these are real; a prompt's own stand in order."""

    pool: int
    rows: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Decode:
    """One step of a pool, of `rows` rows; `sequences` has None where a row is idle.

    Without drafts, row r is slot r. With them a sequence has a row, and as many more after it as guesses
    are verified.
    """

    pool: int
    rows: int
    sequences: tuple[Sequence | None, ...]


@dataclass(frozen=True)
class Copy:
    """What a slot's first tiles hold also stands in another, of the same pool or the next larger one."""

    from_pool: int
    from_slot: int
    to_pool: int
    to_slot: int
    tiles: int


Plan = Prefill | Decode | Copy | LoadAdapter
