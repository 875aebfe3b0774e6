"""Tiles hold every block format exactly, in as much room as they should take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_cases import BLOCKS, normal, random_blocks

from realm_jax import quant
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels.tiles import LANES, dequantize_tiles, tile_rows, tiles_matmul
from realm_jax.quant.containers import pack
from realm_jax.quant.tiling import tile, tile_format

# Bytes in tiles for a byte in the file, at most; types of one and two bits have 2.8.
FOUR_AND_EIGHT_BITS = dict.fromkeys(
    ("Q4_0", "Q4_1", "Q8_0", "Q8_1", "Q4_K", "Q8_K", "IQ4_NL", "IQ4_XS"), 1.05
)
SMALL_FLOATS = {"MXFP4": 1.2, "NVFP4": 1.12}  # a scale is a byte in the file, a float in tiles
THREE_TO_SIX_BITS = dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q3_K", "IQ3_S", "IQ3_XXS"), 1.6)
LIMITS = FOUR_AND_EIGHT_BITS | SMALL_FLOATS | THREE_TO_SIX_BITS | {"Q1_0": 3.7}

expand = jax.jit(dequantize_tiles, static_argnums=1)
look_up = jax.jit(tile_rows, static_argnums=1)
multiply = jax.jit(tiles_matmul, static_argnums=(2, 3))


def assert_exact(rng: np.random.Generator, kind: GGMLType, shape: tuple[int, int]) -> None:
    """The weights, and rows looked up in any order, are those of `dequantize`, bit for bit."""
    data = random_blocks(rng, kind, shape, low=1e-30, high=np.inf)
    wanted = quant.dequantize(data, kind, shape)
    packed = pack(data, kind, shape)
    assert packed is not None
    tiles, form = tile(packed)
    assert tiles.shape == (-(-shape[0] // LANES), form.record) and form == tile_format(packed)
    found = np.asarray(expand(jnp.asarray(tiles), form))
    assert found[: shape[0]].tobytes() == wanted.tobytes()
    assert (found[shape[0] :] == 0).all()
    ids = rng.integers(0, shape[0], (2, 5)).astype(np.int32)
    rows = look_up(jnp.asarray(tiles), form, jnp.asarray(ids))
    assert np.asarray(rows).tobytes() == wanted[ids].tobytes()


@pytest.mark.parametrize("kind", BLOCKS)
def test_tiles_hold_the_dequantized_weights(kind: GGMLType):
    rng = np.random.default_rng(kind)
    outputs = int(rng.integers(17, 32) + LANES * rng.integers(0, 4))
    assert_exact(rng, kind, (outputs, 3 * BLOCK_SIZES[kind].elements))


@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.IQ4_NL])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 32), (15, 64), (16, 288), (17, 32), (64, 1056)])
def test_tiles_of_any_number_of_outputs_and_inputs_are_exact(kind: GGMLType, outputs: int, inputs: int):
    assert_exact(np.random.default_rng(outputs), kind, (outputs, inputs))


@pytest.mark.parametrize("kind", [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.IQ4_NL])
def test_the_plain_product_is_of_the_dequantized_weights(kind: GGMLType):
    rng = np.random.default_rng(kind)
    shape = (int(rng.integers(1, 60)), 256)
    data = random_blocks(rng, kind, shape)
    packed = pack(data, kind, shape)
    assert packed is not None
    tiles, form = tile(packed)
    x, weight = normal(rng, 2, 3, shape[1]), quant.dequantize(data, kind, shape).astype(np.float64)
    found = multiply(jnp.asarray(x), jnp.asarray(tiles), form, shape[0])
    assert found.shape == (2, 3, shape[0])
    assert (np.abs(found - x @ weight.T) <= 2e-6 * (np.abs(x) @ np.abs(weight).T)).all()


def test_sizes_against_the_file():
    """Of outputs that fill tiles, and a record's padding that is small beside it."""
    ratio: dict[str, float] = {}
    for kind in BLOCKS:
        outputs, inputs = 2 * LANES, 2048
        nbytes = outputs * inputs // BLOCK_SIZES[kind].elements * BLOCK_SIZES[kind].nbytes
        packed = pack(np.zeros(nbytes, np.uint8), kind, (outputs, inputs))
        assert packed is not None
        ratio[kind.name] = tile(packed)[0].nbytes / nbytes
    assert {name: value for name, value in ratio.items() if value > LIMITS.get(name, 2.8)} == {}
    assert {name for name, value in ratio.items() if value <= 1.05} == set(FOUR_AND_EIGHT_BITS)
