"""Kernels against NumPy in float64, and bits that do not depend on what else is computed."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax.config import BLOCK, MIN_ROWS, TILE
from realm_jax.kernels import attention, matmul, row_sum


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "window"))
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> jax.Array:
    """Row b attends to slot b."""
    return attention(q, k, v, None, None, None, positions, scale=scale, softcap=softcap, window=window)


multiply = jax.jit(matmul)
sum_rows = jax.jit(row_sum)
FLOAT32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)
TOLERANCE = {FLOAT32: 2e-5, BF16: 2e-2}


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def exact_attention(
    q: Any,
    k: Any,
    v: Any,
    positions: np.ndarray,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> np.ndarray:
    """Softmax attention of one query and one head at a time."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, _ = q.shape
    group = N // k.shape[1]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        p = positions[b, t]
        first = 0 if window is None else max(0, p - window + 1)
        scores = k[b, n // group, first : p + 1] @ q[b, t, n] * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, n // group, first : p + 1]
    return out


# B, T, N, K, H, C, window, soft cap
SHAPES = [
    (1, 1, 4, 4, 8, 256, None, None),
    (3, 1, 9, 3, 64, 512, None, None),
    (1, 64, 6, 2, 24, 256, None, None),
    (2, 7, 4, 1, 96, 256, 5, None),
    (1, 33, 8, 2, 128, 512, 100, 30.0),
    (5, 1, 2, 2, 16, 1024, 300, None),
    (1, 2, 5, 5, 40, 768, None, 20.0),
    (2, 3, 1, 1, 8, 256, 1, 50.0),
]


def problem(rng: np.random.Generator, B: int, T: int, N: int, K: int, H: int, C: int) -> list[np.ndarray]:
    """q, k, v, and consecutive positions that end anywhere in the cache."""
    ends = rng.integers(T, C + 1, B)
    positions = (ends[:, None] - T + np.arange(T)[None]).astype(np.int32)
    return [normal(rng, B, T, N, H), normal(rng, B, K, C, H), normal(rng, B, K, C, H), positions]


@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
@pytest.mark.parametrize(("B", "T", "N", "K", "H", "C", "window", "softcap"), SHAPES)
def test_attention_is_softmax_over_the_visible_positions(
    B: int, T: int, N: int, K: int, H: int, C: int, window: int | None, softcap: float | None, dtype: Any
):
    q, k, v, positions = problem(np.random.default_rng(C + T), B, T, N, K, H, C)
    options = {"scale": H**-0.5, "softcap": softcap, "window": window}
    keys, values = jnp.asarray(k, dtype), jnp.asarray(v, dtype)
    found = attend(jnp.asarray(q), keys, values, jnp.asarray(positions), **options)
    assert found.dtype == FLOAT32
    exact = exact_attention(jnp.asarray(q, dtype), keys, values, positions, **options)
    np.testing.assert_allclose(found, exact, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("garbage", [1e30, -7.0])
def test_attention_does_not_see_later_positions_nor_those_before_the_window(garbage: float):
    q, k, v, _ = problem(np.random.default_rng(0), 1, 2, 4, 2, 16, 512)
    positions = jnp.array([[300, 301]], jnp.int32)
    options = {"scale": 0.25, "softcap": None, "window": 40}
    hidden = np.r_[0 : 300 - 39, 302:512]
    found = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), positions, **options)
    k[:, :, hidden], v[:, :, hidden] = garbage, garbage
    again = attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), positions, **options)
    assert np.asarray(found).tobytes() == np.asarray(again).tobytes()


@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
@pytest.mark.parametrize(
    ("N", "K", "H", "softcap", "window"),
    [(4, 4, 8, None, None), (9, 3, 64, None, None), (4, 1, 24, 30.0, None), (6, 2, 96, None, 77)],
)
def test_bits_of_attention_depend_on_the_query_and_what_it_sees(
    N: int, K: int, H: int, softcap: float | None, window: int | None, dtype: Any
):
    """Not on the rows around it in a decode step, nor on a slot's capacity or on what it held before.

    Rows of a step are never fewer than `MIN_ROWS`, and tiles of prompts have one length: between lengths, the
    bits of float32 may differ.
    """
    rng = np.random.default_rng(H)
    options = {"scale": H**-0.5, "softcap": softcap, "window": window}
    at, seen = 200, 4 * BLOCK
    query, keys, values = normal(rng, N, H), normal(rng, K, seen, H), normal(rng, K, seen, H)
    steps = [(B, 1, C) for B, C in ((MIN_ROWS, 256), (16, 1024), (33, 512))]
    chunks = [(B, TILE, C) for B, C in ((1, 256), (3, 512), (8, 1024))]
    found: dict[int, set[bytes]] = {}
    for B, T, C in steps + chunks:
        for b in {0, B // 2, B - 1}:
            q, k, v, positions = problem(rng, B, T, N, K, H, C)
            q[b, T // 2], k[b, :, :seen], v[b, :, :seen] = query, keys, values
            positions[b] = at - T // 2 + np.arange(T)
            given_k, given_v = jnp.asarray(k, dtype), jnp.asarray(v, dtype)
            out = attend(jnp.asarray(q), given_k, given_v, jnp.asarray(positions), **options)
            found.setdefault(T, set()).add(np.asarray(out[b, T // 2]).tobytes())
    assert [len(bits) for bits in found.values()] == [1, 1]


@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (576, 192), (1000, 33)])
def test_matmul_is_the_product_and_a_row_does_not_depend_on_the_others(inputs: int, outputs: int, dtype: Any):
    rng = np.random.default_rng(inputs)
    weight, row = jnp.asarray(normal(rng, outputs, inputs), dtype), normal(rng, inputs)
    found = set()
    for M in (1, 2, 3, 4, 5, 16, 33, 128, 512):
        x = normal(rng, M, inputs)
        place = int(rng.integers(M))
        x[place] = row
        y = multiply(jnp.asarray(x), weight)
        assert (y.shape, y.dtype) == ((M, outputs), FLOAT32)
        rounded = np.asarray(jnp.asarray(x, dtype), np.float64)
        exact = rounded @ np.asarray(weight, np.float64).T
        np.testing.assert_allclose(y, exact, atol=2e-6 * inputs**0.5 * 4, rtol=1e-5)
        found.add(np.asarray(y[place]).tobytes())
    assert len(found) == 1


def test_matmul_keeps_leading_axes():
    rng = np.random.default_rng(0)
    x, weight = jnp.asarray(normal(rng, 2, 3, 5, 64)), jnp.asarray(normal(rng, 32, 64))
    whole = np.asarray(multiply(x, weight))
    flat = np.asarray(multiply(x.reshape(30, 64), weight))
    assert whole.tobytes() == flat.tobytes()
    assert whole.shape == (2, 3, 5, 32)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([1, 2, 3, 7, 100, 256, 257, 700]),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-30, 1.0, 1e30]),
)
def test_row_sum_is_the_sum(width: int, seed: int, size: float):
    x = normal(np.random.default_rng(seed), width) * np.float32(size)
    exact = math.fsum(x.tolist())
    bound = math.ceil(math.log2(width) + 1) * 2.0**-24 * math.fsum(np.abs(x).tolist())
    assert abs(float(sum_rows(jnp.asarray(x))) - exact) <= bound


@pytest.mark.parametrize("width", [1, 3, 100, 576])
def test_bits_of_row_sum_depend_on_the_row_alone(width: int):
    rng = np.random.default_rng(width)
    row = normal(rng, width) * 10.0 ** rng.integers(-6, 6, width).astype(np.float32)
    found = set()
    for zeros in (0, 5, 1000 - width):
        for lead in ((), (1,), (5,), (64,), (2, 3, 7)):
            x = np.zeros((*lead, width + zeros), np.float32)
            x[..., :width] = normal(rng, *lead, width)
            place = tuple(int(rng.integers(n)) for n in lead)
            x[place][:width] = row
            found.add(float(np.asarray(sum_rows(jnp.asarray(x)))[place]))
    assert len(found) == 1


def plain_attention(q: Any, k: Any, v: Any, at: Any, window: int | None, softcap: float | None) -> Any:
    group = q.shape[2] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    scores = jnp.einsum("btnh,bnch->bntc", q, k, precision="highest") * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = at[:, None, :, None] - jnp.arange(k.shape[2], dtype=jnp.int32)[None, None, None]
    visible = (distance >= 0) & (distance < (window or k.shape[2]))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bntc,bnch->btnh", weights, v, precision="highest")


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, 20.0)])
@pytest.mark.parametrize("C", [BLOCK, 4 * BLOCK])
def test_gradients_of_attention_are_those_of_the_plain_form(
    C: int, window: int | None, softcap: float | None
):
    rng = np.random.default_rng(C)
    q, k, v, at = map(jnp.asarray, problem(rng, 2, 5, 4, 2, 16, C))
    probe = jnp.asarray(normal(rng, *q.shape))

    def ours(q: Any, k: Any, v: Any) -> Any:
        return (attend(q, k, v, at, scale=0.25, softcap=softcap, window=window) * probe).sum()

    def plain(q: Any, k: Any, v: Any) -> Any:
        return (plain_attention(q, k, v, at, window, softcap) * probe).sum()

    found, wanted = (jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (ours, plain))
    for one, other in zip(found, wanted, strict=True):
        assert np.isfinite(one).all()
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("M", [1, 4, 7])
def test_gradients_of_matmul_are_products_too(M: int):
    rng = np.random.default_rng(M)
    x, weight, probe = normal(rng, M, 64), normal(rng, 32, 64), normal(rng, M, 32)

    def weighed(x: jax.Array, weight: jax.Array) -> jax.Array:
        return (matmul(x, weight) * probe).sum()

    by_x, by_weight = jax.grad(weighed, (0, 1))(jnp.asarray(x), jnp.asarray(weight))
    np.testing.assert_allclose(by_x, probe @ weight, atol=1e-4)
    np.testing.assert_allclose(by_weight, probe.T @ x, atol=1e-4)


def test_gradients_of_row_sum_are_ones():
    found = jax.grad(lambda x: row_sum(x).sum())(jnp.ones((3, 37), jnp.float32))
    assert (np.asarray(found) == 1).all()
