"""The gated delta rule in tiles and in steps equals a recurrence in float64, whatever stands beside it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realm_jax import delta_rule
from realm_jax.config import TILE, DeltaNetConfig
from realm_jax.delta_rule import Tokens
from realm_jax.recurrent_cache import RecurrentCache

NET = DeltaNetConfig(key_heads=1, value_heads=2, head_dim=8, taps=4, is_grouped=False)
SLOTS, CAPACITY, LONGEST = 3, 256, 200
NAMES = ("query", "key", "value", "decay", "strength")
TAPS = np.random.default_rng(1).standard_normal((NET.channels, NET.taps)).astype(np.float32)


def drawn(seed: int, tokens: int = LONGEST) -> dict[str, np.ndarray]:
    """Tokens of one sequence, keys of length 1."""
    rng = np.random.default_rng(seed)
    heads = tokens, NET.value_heads, NET.head_dim
    key = rng.standard_normal(heads)
    return {
        "query": rng.standard_normal(heads),
        "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": rng.standard_normal(heads),
        "decay": -rng.exponential(0.3, heads[:2]),
        "strength": rng.uniform(0, 1, heads[:2]),
    }


def alike(tokens: int = LONGEST) -> dict[str, np.ndarray]:
    """Keys that are all the same, written at full strength and never forgotten."""
    given = drawn(0, tokens)
    return given | {
        "key": np.broadcast_to(given["key"][:1], given["key"].shape),
        "decay": np.zeros_like(given["decay"]),
        "strength": np.ones_like(given["strength"]),
    }


def forgetful() -> dict[str, np.ndarray]:
    """A memory that is gone after each token, far past what float32 holds of a tile's whole decay."""
    given = drawn(0)
    return given | {"decay": np.full_like(given["decay"], -50.0)}


def recurrence(given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What each token reads, and the memory after each, in float64."""
    memory = np.zeros((NET.value_heads, NET.head_dim, NET.head_dim))
    out, memories = [], []
    for q, k, v, decay, strength in zip(*(given[name] for name in NAMES), strict=True):
        memory = np.exp(decay)[:, None, None] * memory
        wrong = v - np.einsum("hkv,hk->hv", memory, k)
        memory = memory + np.einsum("hk,hv->hkv", k, strength[:, None] * wrong)
        out.append(np.einsum("hkv,hk->hv", memory, q))
        memories.append(memory)
    return np.stack(out), np.stack(memories)


def rows_of(given: dict[str, np.ndarray], length: int, rows: int, width: int) -> Tokens:
    """The first tokens, cut into rows; what fills the last one up is no part of them."""
    found = {}
    for name in NAMES:
        whole = np.full((rows * width, *given[name].shape[1:]), 7.0, np.float32)
        whole[:length] = given[name][:length]
        found[name] = jnp.asarray(whole.reshape(rows, width, *whole.shape[1:]))
    return Tokens(**found)


@functools.partial(jax.jit, static_argnums=5)
def extended(
    cache: RecurrentCache, tokens: Tokens, slots: jax.Array, starts: jax.Array, lengths: jax.Array, width: int
) -> tuple[jax.Array, RecurrentCache]:
    positions = starts[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return cache.extend(tokens, cache.rows(slots, positions, lengths))


def used() -> RecurrentCache:
    """A cache whose slots hold what other sequences left."""
    empty = RecurrentCache.empty(SLOTS, CAPACITY, NET)
    return jax.tree.map(lambda x: jnp.full_like(x, 3.0), empty)


def tiled(given: dict[str, np.ndarray], length: int, rows: int = 4) -> tuple[np.ndarray, RecurrentCache]:
    """One call of tiles, those of the sequence first and then idle ones."""
    starts = TILE * np.arange(rows, dtype=np.int32)
    lengths = np.clip(length - starts, 0, TILE).astype(np.int32)
    slots = np.where(lengths > 0, 1, SLOTS).astype(np.int32)
    tokens = rows_of(given, length, rows, TILE)
    out, cache = extended(used(), tokens, *map(jnp.asarray, (slots, starts, lengths)), TILE)
    return np.asarray(out).reshape(-1, *out.shape[2:])[:length], cache


def close(found: np.ndarray | jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("given", [drawn(0), alike(), forgetful()], ids=["drawn", "alike", "forgetful"])
def test_tiles_of_any_length_are_the_recurrence(given: dict[str, np.ndarray]) -> None:
    out, memories = recurrence(given)
    for length in range(1, LONGEST + 1):
        found, cache = tiled(given, length)
        close(found, out[:length])
        close(cache.memory[1], memories[length - 1])
        assert (cache.memory[jnp.array([0, 2])] == 3.0).all()


def test_steps_go_on_where_tiles_ended() -> None:
    """Slot 1 steps, beside one that begins and one that is idle."""
    given, other = drawn(0), drawn(1)
    out, _ = recurrence(given)
    beside, _ = recurrence(other)
    _, cache = tiled(given, 100)
    step = jax.jit(lambda cache, tokens, at: cache.extend(tokens, cache.rows(None, at, None)))
    for i in range(20):
        each = {name: np.stack([other[name][i], given[name][100 + i], other[name][0]]) for name in NAMES}
        at = jnp.array([[i], [100 + i], [CAPACITY]], jnp.int32)
        found, cache = step(cache, rows_of(each, 3, 3, 1), at)
        close(found[1, 0], out[100 + i])
        close(found[0, 0], beside[i])
    assert (cache.memory[2] == 3.0).all()


def test_a_tile_has_the_same_bits_in_any_call() -> None:
    """Alone, or fourth of four, after a tile of its own and before one of another sequence."""
    first, second = drawn(0), drawn(1)
    alone, cache = tiled(first, 128, rows=2)
    order = [(second, 0, 2), (first, 0, 1), (first, 64, 1), (second, 64, 2)]
    parts = [rows_of({n: x[at : at + TILE] for n, x in g.items()}, TILE, 1, TILE) for g, at, _ in order]
    tokens = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    starts, slots = (jnp.array([row[i] for row in order], jnp.int32) for i in (1, 2))
    out, together = extended(used(), tokens, slots, starts, jnp.full(4, TILE, jnp.int32), TILE)
    np.testing.assert_array_equal(np.asarray(out[1:3]).reshape(alone.shape), alone)
    np.testing.assert_array_equal(together.memory[1], cache.memory[1])


def test_a_step_has_the_same_bits_in_any_number_of_rows() -> None:
    def stepped(rows: int) -> jax.Array:
        cache = jax.tree.map(lambda x: jnp.full((rows, *x.shape[1:]), 0.5), used())
        tokens = Tokens(*(getattr(rows_of(drawn(0), 32, 32, 1), name)[:rows] for name in NAMES))
        at = jnp.full((rows, 1), 9, jnp.int32)
        return jax.jit(lambda c, t: c.extend(t, c.rows(None, at, None)))(cache, tokens)[0]

    most = stepped(32)
    for rows in (1, 16):
        np.testing.assert_array_equal(stepped(rows), most[:rows])


def test_a_convolution_goes_on_through_tiles_and_steps() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((LONGEST, NET.channels)).astype(np.float32)
    padded = np.concatenate([np.zeros((NET.taps - 1, NET.channels)), x])
    expected = np.sum([padded[j : j + LONGEST] * TAPS[:, j] for j in range(NET.taps)], axis=0)

    @jax.jit
    def convolved(cache: RecurrentCache, x: jax.Array, slots: jax.Array, at: jax.Array, n: jax.Array) -> Any:
        positions = at[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        return cache.convolve(x, jnp.asarray(TAPS), cache.rows(slots, positions, n))

    for length in (1, 2, 3, 64, 65, 66, 67, 130, 191):
        tiles = np.full((3 * TILE, NET.channels), 7.0, np.float32)
        tiles[:length] = x[:length]
        starts = TILE * np.arange(3, dtype=np.int32)
        lengths = np.clip(length - starts, 0, TILE).astype(np.int32)
        slots = np.where(lengths > 0, 1, SLOTS).astype(np.int32)
        rows = map(jnp.asarray, (tiles.reshape(3, TILE, -1), slots, starts, lengths))
        out, cache = convolved(used(), *rows)
        close(np.asarray(out).reshape(3 * TILE, -1)[:length], expected[:length])
        for i in range(length, min(length + 5, LONGEST)):
            row = (jnp.asarray(x[None, None, i]), jnp.array([1]), jnp.array([i]), jnp.array([1]))
            out, cache = convolved(cache, row[0], *(each.astype(jnp.int32) for each in row[1:]))
            close(out[0, 0], expected[i])
        assert (cache.inputs[0] == 3.0).all()


def test_the_inverse_of_a_triangle_is_exact_where_it_is_whole() -> None:
    """Of ones below the diagonal it has minus ones beside the diagonal, and no others."""
    below = jnp.tril(jnp.ones((TILE, TILE)), -1)
    expected = np.eye(TILE) - np.eye(TILE, k=-1)
    np.testing.assert_array_equal(jax.jit(delta_rule.unit_lower_inverse)(below), expected)
