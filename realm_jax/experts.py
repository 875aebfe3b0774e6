"""The experts of a layer as one node: what each row's chosen ones make of it, mixed.

R rows, D hidden, F feed-forward, E experts, A chosen by a row, T tiles of M rows that share an expert.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.kernels import row_sum
from realm_jax.nodes import Biased, Kernel, Stacked

Between = Callable[[Array], Array]
"""From the outputs of gate and up [..., 2F], one after the other, to the inputs of down [..., F]."""

SMALLEST_TILE, LARGEST_TILE = 16, 128
"""Rows of one expert that are multiplied together."""


@runtime_checkable
class Groupable(Kernel, Protocol):
    """A projection of which several can be one, every array with an axis of experts before its own."""

    def grouped(self, x: Float[Array, "T M I"], expert: Int[Array, "T"]) -> Float[Array, "T M O"]:
        """Each tile times its expert's matrix; -1: no expert, the result is zero or never read."""
        ...


@runtime_checkable
class Experts(Protocol):
    """Gated feed-forward layers of one shape."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, D, F."""
        ...

    def mix(
        self, x: Float[Array, "*lead D"], chosen: Int[Array, "*lead A"], share: Array, between: Between
    ) -> Float[Array, "*lead D"]:
        """The sum of the chosen experts' outputs times their shares; other experts leave no trace in it."""
        ...


@struct.dataclass
class EachExpert:
    """Experts one after another: for XLA on a CPU, and matrices that the kernels there do not take.

    One that no row chose is skipped; one that some row chose runs over all rows, so that a row's bits do not
    depend on what the others chose.
    """

    gate_up: tuple[Kernel, ...]
    down: tuple[Kernel, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.down), self.gate_up[0].shape[0], self.down[0].shape[0]

    def mix(
        self, x: Float[Array, "*lead D"], chosen: Int[Array, "*lead A"], share: Array, between: Between
    ) -> Float[Array, "*lead D"]:
        """As `Experts.mix`."""
        out = jnp.zeros_like(x)
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            mine = row_sum(jnp.where(chosen == e, share, 0.0))[..., None]

            def run(m: Array = mine, gate_up: Kernel = gate_up, down: Kernel = down) -> Array:
                # not m * ...: where the expert overflows, 0 * inf would reach rows that did not choose it
                return jnp.where(m != 0, m * (between(x @ gate_up) @ down), 0.0)

            out = out + jax.lax.cond(jnp.any(mine != 0), run, lambda: jnp.zeros_like(x))
        return out


@struct.dataclass
class GroupedExperts:
    """Experts in stacked arrays: rows go to their experts, whose tiles are then multiplied, and no others.

    A tile's rows and its expert are data. A row's bits depend on its own expert and values: where in which
    tile it stands changes nothing.
    tile: rows of a tile; None: as `tile_rows` says.
    """

    gate_up: Groupable
    down: Groupable
    tile: int | None = struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, int, int]:
        count = jax.tree.leaves(self.down)[0].shape[0]
        return count, self.gate_up.shape[0], self.down.shape[0]

    def mix(
        self, x: Float[Array, "*lead D"], chosen: Int[Array, "*lead A"], share: Array, between: Between
    ) -> Float[Array, "*lead D"]:
        """As `Experts.mix`."""
        rows, used = x.reshape(-1, x.shape[-1]), chosen.shape[-1]
        tile = self.tile or tile_rows(chosen.size, self.shape[0])
        place, expert = places(chosen.reshape(-1), self.shape[0], tile)
        pairs = jnp.repeat(rows, used, axis=0)
        tiles = jnp.zeros((len(expert) * tile, rows.shape[1]), x.dtype).at[place].set(pairs)
        hidden = between(self.gate_up.grouped(tiles.reshape(-1, tile, rows.shape[1]), expert))
        found = self.down.grouped(hidden, expert).reshape(-1, rows.shape[1])[place]
        parts = found.reshape(-1, used, rows.shape[1]) * share.reshape(-1, used)[..., None]
        out = parts[:, 0]
        for j in range(1, used):
            out = out + parts[:, j]
        return out.reshape(x.shape)  # pyright: ignore[reportReturnType]


def tile_rows(pairs: int, experts: int) -> int:
    """Rows of a tile, a power of two near what an expert gets on average."""
    return min(LARGEST_TILE, max(SMALLEST_TILE, 1 << (-(-pairs // experts) - 1).bit_length()))


def places(chosen: Int[Array, "n"], experts: int, tile: int) -> tuple[Int[Array, "n"], Int[Array, "T"]]:
    """Where each pair of a row and an expert stands among the tiles' rows, and the expert of each tile.

    Each expert has as many tiles as its pairs need. There are enough tiles for any choice; those left over
    have expert -1.
    """
    n = chosen.shape[0]
    total = (n + min(experts, n) * (tile - 1)) // tile
    is_mine = (chosen[:, None] == jnp.arange(experts, dtype=chosen.dtype)[None]).astype(jnp.int32)
    before = jnp.cumsum(is_mine, axis=0) - is_mine  # pairs of the same expert before each pair
    tiles = (is_mine.sum(axis=0) + tile - 1) // tile
    ends = jnp.cumsum(tiles)
    nth = jnp.take_along_axis(before, chosen[:, None], axis=1)[:, 0]
    place = (ends - tiles)[chosen] * tile + nth
    expert = jnp.searchsorted(ends, jnp.arange(total, dtype=ends.dtype), side="right").astype(jnp.int32)
    return place, jnp.where(expert < experts, expert, -1)


def _consists(node: Kernel, of: type | tuple[type, ...]) -> bool:
    """Whether the parts of a projection are nodes of these types."""
    if isinstance(node, Biased):
        return _consists(node.kernel, of)
    parts = node.parts if isinstance(node, Stacked) else (node,)
    return all(isinstance(part, of) for part in parts)


def joined(
    gate_up: Sequence[Kernel],
    down: Sequence[Kernel],
    *,
    stacked: type | tuple[type, ...],
    tile: int | None = None,
) -> Experts:
    """The experts as one node: in stacked arrays where all of their projections are of the types `stacked`.

    tile: as `GroupedExperts` has it.
    """
    if not all(_consists(node, stacked) for node in (*gate_up, *down)):
        return EachExpert(tuple(gate_up), tuple(down))

    def stack(each: Sequence[Kernel]) -> Groupable:
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)

    return GroupedExperts(stack(gate_up), stack(down), tile)
