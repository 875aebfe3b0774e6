"""The best of a row without sorting it.

R rows, V vocabulary, A selected values.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from realm_jax.kernels.reference import row_sum

TILE = 16
"""Top-k looks for the best tiles of so many values first."""

ARGMAX_TILE = 64
"""The same for the best alone."""


def first_argmax(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """The first index of each row's maximum: of the tiles' maxima first, then within that tile.

    Many times faster than argmax on CPU, where one reads the row twice or compares it number by number.
    """
    R, V = x.shape
    tiles = -(-V // ARGMAX_TILE)
    padding = ((0, 0), (0, tiles * ARGMAX_TILE - V))
    tiled = jnp.pad(x, padding, constant_values=-jnp.inf).reshape(R, tiles, ARGMAX_TILE)
    tile = _plain_first_argmax(tiled.max(axis=-1))
    within = jnp.take_along_axis(tiled, tile[:, None, None], axis=1)[:, 0]
    return jnp.minimum(tile * ARGMAX_TILE + _plain_first_argmax(within), V - 1)


def _plain_first_argmax(x: Float[Array, "R n"]) -> Int[Array, "R"]:
    """By two reductions."""
    n = x.shape[-1]
    ids = jnp.arange(n, dtype=jnp.int32)[None]
    first = jnp.where(x == x.max(axis=-1, keepdims=True), ids, n).min(axis=-1)
    return jnp.minimum(first, n - 1)  # a row of NaN has no maximum


def top_k(x: Float[Array, "R V"], count: int) -> tuple[Float[Array, "R A"], Int[Array, "R A"]]:
    """The largest values of each row, best first, of equal ones the first, and where they stand.

    They stand in the `count` tiles of the largest maxima (of equal ones the first): any value elsewhere
    has as many before it.
    """
    R, V = x.shape
    tiles = -(-V // TILE)
    if tiles <= 2 * count:
        return _plain_top_k(x, count)
    tiled = jnp.pad(x, ((0, 0), (0, tiles * TILE - V)), constant_values=-jnp.inf).reshape(R, tiles, TILE)
    best = jnp.sort(_plain_top_k(tiled.max(axis=-1), count)[1], axis=-1)
    values, at = _plain_top_k(jnp.take_along_axis(tiled, best[:, :, None], axis=1).reshape(R, -1), count)
    ids = jnp.take_along_axis(best, at // TILE, axis=-1) * TILE + at % TILE
    return values, jnp.minimum(ids, V - 1)  # in a row of NaN the end's padding may win


def _plain_top_k(x: Float[Array, "R n"], count: int) -> tuple[Float[Array, "R A"], Int[Array, "R A"]]:
    """In one pass. The barrier keeps both outputs whole: a slice of one that is merged into the operation
    makes XLA's CPU backend sort the row, a hundred times slower. Not in the operation's own order: for
    several devices, XLA joins both to the operation's pair again, and then fails on that."""
    values, ids = jax.lax.top_k(x, count)
    ids, values = jax.lax.optimization_barrier((ids, values))
    return values, ids


def threshold(
    values: Float[Array, "R V"], amounts: Float[Array, "R V"], target: Float[Array, "R"]
) -> Float[Array, "R"]:
    """The largest value t of each row such that the amounts of values >= t reach the target.

    Bisection over the 32 bits of a float, in the order of floats: exact, without a sort. A target of 0
    is no limit: -inf, and where all targets are 0 nothing is computed.
    """

    def halve(_: Int[Array, ""], bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # low reaches the target, high does not
        middle = low + (high - low) // 2
        reached = row_sum(jnp.where(values >= _from_ordered(middle)[:, None], amounts, 0.0)) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    lowest = jnp.full(target.shape, _LOWEST_ORDERED, jnp.uint32)
    highest = jnp.where(target > 0, jnp.uint32(_INFINITY_ORDERED), lowest + 1)
    steps = jnp.where(jnp.any(target > 0), 32, 0)
    low, _ = jax.lax.fori_loop(0, steps, halve, (lowest, highest))
    return _from_ordered(low)


_LOWEST_ORDERED = 0x007FFFFF  # -inf, where floats are numbered in their order
_INFINITY_ORDERED = 0xFF800000


def _from_ordered(number: UInt32[Array, "R"]) -> Float[Array, "R"]:
    """The float at this place in the order of all floats."""
    bits = jnp.where(number >> 31 == 1, number & 0x7FFFFFFF, ~number)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
