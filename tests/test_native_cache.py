"""C++ writes: tiles of a file's blocks, keys and values into a cache, as the plain code writes them."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import (
    BLOCKS,
    instruction_sets,
    normal,
    paired_keys,
    paired_values,
    random_blocks,
    require_native,
    using,
)

from realm_jax.cache import KVCache, NativeInt8Cache, NativeKVCache, Stepwise, empty_cache
from realm_jax.config import Numerics
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels.native import calls
from realm_jax.kernels.native.tiling import tile_into
from realm_jax.native_nodes import NativeRotation
from realm_jax.quant.containers import pack
from realm_jax.quant.tiling import tile

require_native()

IN_TILES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
ODD = [
    np.nan,
    -np.nan,
    np.inf,
    -np.inf,
    3.4e38,
    3.396e38,
    -3.396e38,
    0,
    -0.0,
]  # some round to bf16's infinity


@pytest.mark.parametrize("kind", BLOCKS)
def test_tiles_are_those_of_numpy(kind: GGMLType):
    """Every byte that is used; a type that the library does not know is left to NumPy."""
    rng = np.random.default_rng(kind)
    for outputs in (1, 16, 47):
        shape = (outputs, 3 * BLOCK_SIZES[kind].elements)
        data = random_blocks(rng, kind, shape, low=0, high=np.inf)
        packed = pack(data, kind, shape)
        assert packed is not None
        wanted, form = tile(packed)
        found = np.full_like(wanted, 0xAB)
        if not tile_into(found, data, kind, shape):
            assert kind.name not in IN_TILES and (found == 0xAB).all()
            continue
        codes, supers, group_bytes = form.sizes
        used = codes + (supers + group_bytes) * (2 if form.has_minimum else 1)
        np.testing.assert_array_equal(found[:, :used], wanted[:, :used])


def test_a_record_of_another_size_is_not_written():
    data, tiles = np.zeros(16 * 18, np.uint8), np.zeros((1, 256), np.uint8)
    assert not tile_into(tiles, data, GGMLType.Q4_0, (16, 32))


def finite(x: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(x), x, x.dtype.type(0))


def as_bf16(x: np.ndarray) -> tuple[np.ndarray]:
    """bf16's bits; what is no number, and what rounds to infinity, is 0."""
    with np.errstate(over="ignore", invalid="ignore"):
        return (finite(x.astype(ml_dtypes.bfloat16)).view(np.uint16),)


def as_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and the scale of each token and head; what is no number is 0."""
    scale = np.abs(finite(x)).max(-1) / np.float32(127)
    return np.rint(finite(x) / np.where(scale > 0, scale, np.float32(1))[..., None]).astype(np.int8), scale


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 2, 19]),
    st.sampled_from([8, 15, 16, 24, 33, 64, 96]),
    st.booleans(),
    st.sampled_from(instruction_sets()),
    st.integers(0, 2**32 - 1),
)
def test_tokens_stand_in_their_slots_at_their_positions(
    B: int, T: int, H: int, has_slots: bool, name: str, seed: int
):
    """Bit for bit, and nothing else has changed; positions and slots past the last are dropped."""
    rng = np.random.default_rng(seed)
    K, C, S = int(rng.integers(1, 4)), 64, B + 1
    x = normal(rng, B, T, K, H) * 10.0 ** rng.integers(-5, 5, (B, T, K, 1)).astype(np.float32)
    x = np.where(rng.random(x.shape) < 0.05, rng.choice(ODD, x.shape), x).astype(np.float32)
    x[0, 0] = 0
    slots = rng.permutation(S + 1)[:B].astype(np.int32)
    starts = rng.choice([0, C - T, C - T // 2, C, int(rng.integers(0, C))], (B, 1))
    positions = (starts + np.arange(T)).astype(np.int32)
    bits = rng.integers(0, 2**16, (S, K, C, H)).astype(np.uint16)
    codes, scales = bits.astype(np.int8), rng.random((S, K, C), np.float32)
    has_pairs = H % 16 == 0  # other heads are kept by XLA's own cache
    given = jnp.asarray(x), jnp.asarray(slots) if has_slots else None, jnp.asarray(positions)
    with using(name):
        found = calls.write_cache_int8(*given, jnp.asarray(codes), jnp.asarray(scales))
        if has_pairs:
            found += (calls.write_cache(*given, jnp.asarray(paired_keys(bits)), is_keys=True),)
            found += (calls.write_cache(*given, jnp.asarray(paired_values(bits)), is_keys=False),)
    wanted = bits, codes, scales
    for b, t in np.ndindex(B, T):
        slot = slots[b] if has_slots else b
        if slot < S and positions[b, t] < C:
            for cache, new in zip(wanted, as_bf16(x[b, t]) + as_int8(x[b, t]), strict=True):
                cache[slot, :, positions[b, t]] = new
    expected = (codes, scales, *((paired_keys(bits), paired_values(bits)) if has_pairs else ()))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == other.tobytes()


NATIVE = Numerics("bfloat16", "bfloat16", "quantized", "native")
PLAIN = Numerics("bfloat16", "bfloat16", "dense", "xla")
CACHES = [("bfloat16", NativeKVCache), ("int8", NativeInt8Cache)]


@pytest.mark.parametrize(("kv_dtype", "kind"), CACHES)
def test_caches_hold_what_the_plain_ones_hold(kv_dtype: Any, kind: type):
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(normal(rng, 2, 5, 2, 32)) for _ in range(2))
    slots, positions = jnp.array([2, 0], jnp.int32), jnp.asarray(np.arange(10, dtype=np.int32).reshape(2, 5))
    plain, native = (
        empty_cache((3, 2, 64, 32), replace(numerics, kv_dtype=kv_dtype)).write(k, v, slots, positions)
        for numerics in (PLAIN, NATIVE)
    )
    assert type(native) is kind
    kept = [np.asarray(leaf) for leaf in jax.tree.leaves(plain)]
    if kv_dtype == "bfloat16":
        kept = [paired_keys(kept[0]), paired_values(kept[1])]
    for one, other in zip(kept, jax.tree.leaves(native), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one.astype(np.float32), np.asarray(other, np.float32), rtol=2e-7)


@pytest.mark.parametrize("head_dim", [8, 24, 40])
def test_heads_of_no_whole_vectors_are_kept_by_the_plain_cache(head_dim: int):
    assert type(empty_cache((1, 1, 64, head_dim), NATIVE)) is KVCache


@pytest.mark.parametrize(("kv_dtype", "kind"), CACHES)
def test_a_donated_cache_is_written_in_place(kv_dtype: Any, kind: type):
    cache = empty_cache((2, 1, 64, 32), replace(NATIVE, kv_dtype=kv_dtype))
    assert type(cache) is kind
    new, positions = jnp.ones((2, 1, 1, 32)), jnp.full((2, 1), 7, jnp.int32)
    turn, how = NativeRotation(jnp.ones((2, 1, 4)), jnp.ones((2, 1, 4)), False), {"scale": 1.0}
    heads = jnp.ones((2, 1, 3, 32))
    for write in (
        lambda cache: cache.write(new, new, None, positions),
        lambda cache: cache.extend(heads, turn, None, positions, softcap=None, window=None, **how)[1],
    ):
        kept = jax.jit(write)(cache)  # not given away: what was there stays
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(kept)]
        again = jax.jit(write, donate_argnums=0)(kept)
        assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(again)] == places


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(CACHES),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 3, 40]),
    st.sampled_from([(1, 1), (3, 3), (2, 1), (4, 2)]),
    st.sampled_from([(16, 8), (32, 4), (64, 32), (80, 40)]),
    st.booleans(),
    st.sampled_from([(None, None), (9, None), (None, 20.0)]),
    st.integers(0, 2**32 - 1),
)
def test_extending_is_turning_writing_and_attending(
    cache_kind: tuple[Any, type],
    B: int,
    T: int,
    heads: tuple[int, int],
    size: tuple[int, int],
    interleaved: bool,
    how: tuple[int | None, float | None],
    seed: int,
):
    """Bit for bit, as three operations give it; rows of one slot see each other's new keys."""
    rng = np.random.default_rng(seed)
    (N, K), (H, P), C = heads, size, 320
    has_slots = rng.integers(2) == 1
    cache: Any = empty_cache((B + 1, K, C, H), replace(NATIVE, kv_dtype=cache_kind[0]))
    earlier = jnp.asarray(np.tile(np.arange(C - 1, dtype=np.int32), (B, 1)))
    cache = cache.write(*(jnp.asarray(normal(rng, B, C - 1, K, H)) for _ in "kv"), None, earlier)
    starts = int(rng.integers(0, C - B * T + 8)) + T * np.arange(B)[:, None]  # the last may be past the end
    cos, sin = (jnp.asarray(normal(rng, B, T, P)) for _ in range(2))
    given: tuple[Any, ...] = (
        jnp.asarray(normal(rng, B, T, N + 2 * K, H)),
        NativeRotation(cos, sin, interleaved),
        jnp.asarray(np.full(B, rng.integers(0, B + 2), np.int32)) if has_slots else None,
        jnp.asarray((starts + np.arange(T)).astype(np.int32)),
    )
    sinks = jnp.asarray(normal(rng, N)) if rng.integers(2) else None
    options = {"scale": 0.2, "window": how[0], "softcap": how[1], "sinks": sinks}
    found: Any = cache.extend(*given, **options)
    wanted = Stepwise.extend(cache, *given, **options)
    assert type(found[1]) is cache_kind[1]
    assert found[0].shape == (B, T, N, H)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
