"""The C++ products and norm against NumPy in float64, and bits that depend on the row alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import BLOCKS, instruction_sets, normal, random_blocks, require_native, using

from realm_jax import rope
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels import reference
from realm_jax.kernels.native import calls
from realm_jax.kernels.tiles import TileFormat
from realm_jax.quant.containers import pack, unpack
from realm_jax.quant.tiling import tile

require_native()

ROUNDING = 2.0**-24
KINDS = [GGMLType.Q4_1, GGMLType.Q4_K, GGMLType.Q2_K, GGMLType.IQ4_NL, GGMLType.Q6_K, GGMLType.MXFP4]
"""All that the product branches on: 4 and 8 bits, groups of 16 and 32, tables, bytes, minima, float32."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A random matrix in tiles; `exact` is what it holds, `parts` the magnitudes that are added up in it."""

    tiles: jax.Array
    form: TileFormat
    exact: np.ndarray  # float64 [O, I]
    parts: np.ndarray  # float64 [O, I]

    @classmethod
    def random(cls, rng: np.random.Generator, kind: GGMLType, outputs: int, inputs: int) -> "Weight":
        packed = pack(random_blocks(rng, kind, (outputs, inputs)), kind, (outputs, inputs))
        assert packed is not None
        tiles, form = tile(packed)
        exact = unpack(packed).astype(np.float64)
        scaled = unpack(replace(packed, super_min=None, group_min=None)).astype(np.float64)
        return cls(jnp.asarray(tiles), form, exact, np.abs(scaled) + np.abs(exact - scaled))

    def product(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(calls.tiles_matmul(jnp.asarray(x), self.tiles, self.form, len(self.exact)))


def widths(kind: GGMLType) -> list[int]:
    return [n for n in (32, 96, 256, 576, 768, 1152) if n % BLOCK_SIZES[kind].elements == 0]


def rounded(x: np.ndarray) -> np.ndarray:
    """x in steps of a 127th of each 32 inputs' largest magnitude, in float64."""
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    codes = np.rint(blocks / np.where(step > 0, step, 1))
    return (codes * step).reshape(x.shape)


def off_ties(x: np.ndarray) -> np.ndarray:
    """x with zeros where a number lies so near the middle of two steps that float32 may choose the other."""
    blocks = x.reshape(len(x), -1, 32)
    place = blocks / (np.abs(blocks).max(-1, keepdims=True) / 127) % 1
    return np.where(np.abs(place - 0.5) < 1e-3, np.float32(0), blocks).reshape(x.shape)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_product_is_that_of_rounded_rows_and_exact_weights(kind: GGMLType):
    rng = np.random.default_rng(kind)
    for inputs in rng.choice(widths(kind), 2, replace=False):
        weight = Weight.random(rng, kind, int(rng.integers(1, 100)), int(inputs))
        for M in (int(rng.integers(1, 9)), int(rng.integers(9, 41))):
            sizes = 10.0 ** rng.integers(-3, 3, (M, 1)).astype(np.float32)
            x = off_ties(normal(rng, M, inputs) * sizes)
            steps = rounded(x)
            bound = (inputs / 32 + 8) * ROUNDING * (np.abs(steps) @ weight.parts.T)
            assert (np.abs(weight.product(x) - steps @ weight.exact.T) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_int8_are_multiplied_exactly(kind: GGMLType):
    """Up to the rounding of float32 sums; what is near zero counts as zero."""
    rng = np.random.default_rng(kind)
    weight = Weight.random(rng, kind, 40, 768)
    x = rng.integers(-127, 128, (11, 24, 32)).astype(np.float32)
    x[:, :, 5] = 127
    x = (x * 2.0 ** rng.integers(-8, 8, (11, 24, 1))).astype(np.float32).reshape(11, 768)
    x[3, 64:96] = 0
    bound = 32 * ROUNDING * (np.abs(x) @ weight.parts.T)
    assert (np.abs(weight.product(x) - x.astype(np.float64) @ weight.exact.T) <= bound).all()
    assert (weight.product(np.full((1, 768), 1e-31, np.float32)) == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_the_rows_costs_one_percent(kind: GGMLType):
    rng = np.random.default_rng(kind)
    weight, x = Weight.random(rng, kind, 64, 768), normal(rng, 5, 768)
    error = weight.product(x) - x.astype(np.float64) @ weight.exact.T
    size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(weight.exact, axis=1)[None]
    assert np.sqrt(np.mean((error / size * 768**0.5) ** 2)) < 0.01


Rows = Callable[[np.ndarray], np.ndarray]


def operations(rng: np.random.Generator, kinds: list[GGMLType]) -> dict[str, tuple[int, Rows]]:
    """Everything that maps rows to rows, with its inputs; odd numbers of outputs."""
    found: dict[str, tuple[int, Rows]] = {}
    for kind in kinds:
        found[kind.name] = (768, Weight.random(rng, kind, 67, 768).product)
    half = jnp.asarray(normal(rng, 67, 416), jnp.bfloat16)
    found["bf16"] = (416, lambda x: np.asarray(calls.matmul(jnp.asarray(x), half)))
    factors = jnp.asarray(normal(rng, 203))
    found["norm"] = (203, lambda x: np.asarray(calls.rms_norm(jnp.asarray(x), factors, 1e-5)))
    return found


OPERATIONS = operations(np.random.default_rng(0), KINDS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_bits_of_a_row_depend_on_the_row_alone(name: str):
    """Any number of rows, any place, any neighbours, such that are not numbers too."""
    rng = np.random.default_rng(1)
    inputs, operation = OPERATIONS[name]
    row = normal(rng, inputs)
    alone = operation(row[None])[0]
    assert np.isfinite(alone).all()
    for M in [*range(2, 14), *rng.choice(np.arange(14, 70), 4, replace=False), 70]:
        x = normal(rng, M, inputs) * 10.0 ** rng.integers(-4, 4, (M, 1)).astype(np.float32)
        x[rng.integers(0, M), rng.integers(0, inputs)] = rng.choice([np.nan, np.inf, -np.inf, 3e38, 0])
        places = rng.choice(M, min(M, 5), replace=False)
        x[places] = row
        for found in operation(x)[places]:
            assert found.tobytes() == alone.tobytes()


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("M", [3, 12])
def test_what_is_not_a_number_is_not_hidden(name: str, M: int):
    inputs, operation = OPERATIONS[name]
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        x = normal(np.random.default_rng(M), M, inputs)
        for place in (0, inputs // 2, inputs - 1):
            x[1] = 1
            x[1, place] = value
            found = operation(x)
            if name == "norm":  # of infinity, the others become 0
                assert np.isnan(found[1, place])
            else:
                assert not np.isfinite(found[1]).any()
            assert np.isfinite(np.delete(found, 1, axis=0)).all()


@pytest.mark.parametrize("kind", BLOCKS)
def test_bits_do_not_depend_on_the_instruction_set(kind: GGMLType):
    """Sums of codes are exact integers, and blocks are added in one order."""
    rng = np.random.default_rng(kind)
    weight = Weight.random(rng, kind, 53, widths(kind)[-1])
    for M in (5, 19):
        x, found = normal(rng, M, weight.form.inputs), set()
        for name in instruction_sets():
            with using(name):
                found.add(weight.product(x).tobytes())
        assert len(found) == 1


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1, 2, 3, 4, 5, 7, 8, 21, 40]),
    st.sampled_from([1, 3, 4, 6, 33]),
    st.sampled_from([32, 96, 256, 576]),
    st.sampled_from(instruction_sets()),
    st.integers(0, 2**32 - 1),
)
def test_the_bf16_product_is_that_of_rounded_rows(M: int, outputs: int, inputs: int, name: str, seed: int):
    rng = np.random.default_rng(seed)
    weight, x = normal(rng, outputs, inputs).astype(ml_dtypes.bfloat16), normal(rng, M, inputs)
    with using(name):
        found = np.asarray(calls.matmul(jnp.asarray(x), jnp.asarray(weight)))
    steps, exact = x.astype(weight.dtype).astype(np.float64), weight.astype(np.float64)
    bound = (inputs / 16 + 8) * ROUNDING * (np.abs(steps) @ np.abs(exact).T)
    assert (np.abs(found - steps @ exact.T) <= bound).all()


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from([1, 2, 5]), min_size=0, max_size=3),
    st.sampled_from([1, 2, 15, 16, 17, 31, 64, 100, 576, 1031]),
    st.sampled_from(instruction_sets()),
    st.integers(0, 2**32 - 1),
)
def test_rms_norm_scales_rows_to_one(lead: list[int], features: int, name: str, seed: int):
    rng = np.random.default_rng(seed)
    x, factors = normal(rng, *lead, features) * np.float32(3), normal(rng, features)
    with using(name):
        found = np.asarray(calls.rms_norm(jnp.asarray(x), jnp.asarray(factors), 1e-5))
    assert found.shape == x.shape
    square = np.square(x.astype(np.float64)).mean(-1, keepdims=True)
    np.testing.assert_allclose(found, x / np.sqrt(square + 1e-5) * factors, rtol=1e-6)


def test_bf16_products_and_norms_are_the_references():
    rng = np.random.default_rng(0)
    x, factors = jnp.asarray(normal(rng, 6, 224)), jnp.asarray(normal(rng, 224))
    weight = jnp.asarray(normal(rng, 20, 224), jnp.bfloat16)
    wanted = jax.jit(reference.rms_norm, static_argnums=2)(x, factors, 1e-5)
    np.testing.assert_allclose(calls.rms_norm(x, factors, 1e-5), wanted, rtol=1e-6)
    np.testing.assert_allclose(calls.matmul(x, weight), reference.matmul(x, weight), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_product_are_those_of_the_dequantized_weight(kind: GGMLType):
    rng = np.random.default_rng(kind)
    weight, x, probe = Weight.random(rng, kind, 37, 256), normal(rng, 2, 3, 256), normal(rng, 2, 3, 37)

    def weighed(x: jax.Array) -> jax.Array:
        return (calls.tiles_matmul(x, weight.tiles, weight.form, 37) * probe).sum()

    found = jax.jit(jax.grad(weighed))(jnp.asarray(x))
    wanted, bound = probe @ weight.exact, 64 * ROUNDING * (np.abs(probe) @ np.abs(weight.exact))
    assert (np.abs(found - wanted) <= bound).all()


@pytest.mark.parametrize("M", [1, 6])
def test_gradients_of_bf16_products_and_norms_are_the_references(M: int):
    rng = np.random.default_rng(M)
    weight, factors = jnp.asarray(normal(rng, 24, 64), jnp.bfloat16), jnp.asarray(normal(rng, 64))
    x, probe = jnp.asarray(normal(rng, M, 64)), jnp.asarray(normal(rng, M, 24))

    def weighed(operations: object) -> Callable[..., jax.Array]:
        def value(x: jax.Array, factors: jax.Array, weight: jax.Array) -> jax.Array:
            normed = operations.rms_norm(x, factors, 1e-5)  # pyright: ignore[reportAttributeAccessIssue]
            return (operations.matmul(normed, weight) * probe).sum()  # pyright: ignore[reportAttributeAccessIssue]

        return jax.jit(jax.grad(value, (0, 1, 2)))

    ours, theirs = weighed(calls)(x, factors, weight), weighed(reference)(x, factors, weight)
    for found, wanted in zip(ours, theirs, strict=True):
        assert found.dtype == wanted.dtype and np.abs(np.asarray(wanted, np.float32)).max() > 0.1
        tolerance = 2e-2 if found.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(
            np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=tolerance, atol=tolerance
        )


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 9]),
    st.sampled_from([(8, 4), (24, 8), (64, 32), (80, 40), (96, 17), (128, 64), (33, 3)]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_heads_are_turned_by_their_tokens_angles(
    B: int, T: int, sizes: tuple[int, int], interleaved: bool, seed: int
):
    """Alike on every instruction set, and back again by the opposite angles."""
    rng = np.random.default_rng(seed)
    (H, P), N = sizes, int(rng.integers(1, 5))
    x, angles = normal(rng, B, T, N, H), rng.uniform(-9, 9, (B, T, P)).astype(np.float32)
    cos, sin = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
    results = []
    for name in instruction_sets():
        with using(name):
            results.append(np.asarray(calls.rotate(jnp.asarray(x), cos, sin, interleaved)))
    assert len({result.tobytes() for result in results}) == 1
    first, second = (slice(0, 2 * P, 2), slice(1, 2 * P, 2)) if interleaved else (slice(P), slice(P, 2 * P))
    pairs = x[..., first] + 1j * x[..., second]
    turned = pairs * (np.asarray(cos) + 1j * np.asarray(sin, np.float64))[:, :, None]
    wanted = x.astype(np.float64)
    wanted[..., first], wanted[..., second] = turned.real, turned.imag
    np.testing.assert_allclose(results[0], wanted, atol=1e-6, rtol=1e-6)
    assert (results[0][..., 2 * P :] == x[..., 2 * P :]).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_turned_heads_are_the_references(interleaved: bool):
    rng = np.random.default_rng(0)
    x, probe = jnp.asarray(normal(rng, 2, 3, 4, 24)), jnp.asarray(normal(rng, 2, 3, 4, 24))
    cos, sin = jnp.asarray(normal(rng, 2, 3, 8)), jnp.asarray(normal(rng, 2, 3, 8))
    ours = jax.vjp(lambda x: calls.rotate(x, cos, sin, interleaved), x)[1](probe)[0]
    theirs = jax.vjp(lambda x: rope.rotate(x, cos, sin, interleaved=interleaved), x)[1](probe)[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_leading_axes_are_rows():
    rng = np.random.default_rng(0)
    weight = Weight.random(rng, GGMLType.Q4_0, 20, 64)
    x = normal(rng, 2, 3, 64)
    whole = weight.product(x)
    assert whole.shape == (2, 3, 20) and whole.tobytes() == weight.product(x.reshape(6, 64)).tobytes()
