"""What a slot holds, copied to another: of attention the first tiles, of recurrent layers all."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from realm_jax.cache import Cache
from realm_jax.config import TILE
from realm_jax.decoding import DecodeState
from realm_jax.recurrent_cache import RecurrentCache

COPIED = 4
"""A slot is copied so many tiles at a time: no second whole slot on the way, and not one call a tile."""


@functools.partial(jax.jit, donate_argnums=0)
def copy_within(
    state: DecodeState, from_slot: Int[Array, ""], to_slot: Int[Array, ""], tiles: Int[Array, ""]
) -> DecodeState:
    """The state with what a slot's first tiles hold also in `to_slot`."""
    return _copied(None, state, from_slot, to_slot, tiles)


@functools.partial(jax.jit, donate_argnums=1)
def copy_up(
    source: DecodeState,
    target: DecodeState,
    from_slot: Int[Array, ""],
    to_slot: Int[Array, ""],
    tiles: Int[Array, ""],
) -> DecodeState:
    """The target with what the first tiles of a smaller pool's slot hold in `to_slot`."""
    return _copied(source, target, from_slot, to_slot, tiles)


def _copied(
    source: DecodeState | None, target: DecodeState, from_slot: Array, to_slot: Array, tiles: Array
) -> DecodeState:
    """source: None where it is the target, of which no second version may be kept alive."""
    held = target if source is None else source
    most = held.history.shape[1] // TILE
    step = min(COPIED, most)

    def copy_some(i: Array, caches: Any) -> Any:
        at = jnp.minimum(i * step, most - step)

        def copy(s: Array, t: Array) -> Array:
            width = s.shape[2] // most  # of a tile: its positions, or blocks of them
            rest = (0,) * (s.ndim - 3)
            some = (1, s.shape[1], step * width, *s.shape[3:])
            values = jax.lax.dynamic_slice(s, (from_slot, 0, at * width, *rest), some)
            return jax.lax.dynamic_update_slice(t, values, (to_slot, 0, at * width, *rest))

        def of_layer(s: Any, t: Any) -> Any:
            return t if isinstance(t, RecurrentCache) else jax.tree.map(copy, s, t)

        return _by_layer(of_layer, caches if source is None else _caches(source), caches)

    def copy_row(s: Array, t: Array) -> Array:
        row = jax.lax.dynamic_slice_in_dim(s, from_slot, 1)
        return jax.lax.dynamic_update_slice(t, row, (to_slot, *(0 for _ in t.shape[1:])))

    def copy_state(s: Any, t: Any) -> Any:
        if not isinstance(t, RecurrentCache):
            return t
        return replace(t, inputs=copy_row(s.inputs, t.inputs), memory=copy_row(s.memory, t.memory))

    caches = jax.lax.fori_loop(jnp.int32(0), -(-tiles // step), copy_some, _caches(target))
    caches = _by_layer(copy_state, _caches(held), caches)
    rest = jax.tree.map(copy_row, _with_caches(held, ((), ())), _with_caches(target, ((), ())))
    return _with_caches(rest, caches)


def _by_layer(function: Callable[[Any, Any], Any], source: Any, target: Any) -> Any:
    """The target with the function of each layer's two caches."""

    def is_layer(x: Any) -> bool:
        return isinstance(x, Cache | RecurrentCache)

    return jax.tree.map(function, source, target, is_leaf=is_layer)


def _caches(state: DecodeState) -> tuple[Any, Any]:
    return state.caches, state.draft.caches


def _with_caches(state: DecodeState, caches: tuple[Any, Any]) -> DecodeState:
    return replace(state, caches=caches[0], draft=replace(state.draft, caches=caches[1]))
