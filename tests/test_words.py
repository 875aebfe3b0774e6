"""Words hold every block format exactly, in as much room as they should take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_cases import BLOCKS, random_blocks

from realm_jax import quant
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels.words import WordFormat, dequantize_words, word_rows
from realm_jax.quant.containers import pack
from realm_jax.quant.wording import word_format, words

# Bytes in words for a byte in the file, at most.
FOUR_AND_EIGHT_BITS = dict.fromkeys(
    ("Q4_0", "Q4_1", "Q8_0", "Q8_1", "Q4_K", "Q8_K", "IQ4_NL", "IQ4_XS"), 1.03
)
SMALL_FLOATS = {"MXFP4": 1.2, "NVFP4": 1.12}  # a scale is a byte in the file, a float in words
THREE_TO_SIX_BITS = dict.fromkeys(("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q3_K", "IQ3_S", "IQ3_XXS"), 1.6)
LIMITS = FOUR_AND_EIGHT_BITS | SMALL_FLOATS | THREE_TO_SIX_BITS | {"Q1_0": 3.7}

QUICK = {"xla_backend_optimization_level": 0}  # every format is a program of its own
expand = jax.jit(dequantize_words, static_argnums=1, compiler_options=QUICK)
look_up = jax.jit(word_rows, static_argnums=1, compiler_options=QUICK)


def random_words(
    rng: np.random.Generator, kind: GGMLType, shape: tuple[int, int]
) -> tuple[jax.Array, WordFormat, np.ndarray]:
    """Words, their format, and the weights [out, in] that they stand for."""
    data = random_blocks(rng, kind, shape, low=1e-30, high=np.inf)
    packed = pack(data, kind, shape)
    assert packed is not None
    return jnp.asarray(words(packed)), word_format(packed), quant.dequantize(data, kind, shape)


@pytest.mark.parametrize("kind", BLOCKS)
def test_words_hold_the_dequantized_weights(kind: GGMLType):
    rng = np.random.default_rng(kind)
    shape = (int(rng.integers(1, 9)), 3 * max(BLOCK_SIZES[kind].elements, 32))
    array, form, wanted = random_words(rng, kind, shape)
    assert array.shape == (form.units, form.height, shape[0])
    assert (np.asarray(expand(array, form)) == wanted.T).all()


@pytest.mark.parametrize(
    ("kind", "inputs"), [(GGMLType.Q4_1, 288), (GGMLType.Q8_0, 32), (GGMLType.Q6_K, 512)]
)
def test_rows_are_looked_up_in_any_order(kind: GGMLType, inputs: int):
    rng = np.random.default_rng(kind)
    array, form, wanted = random_words(rng, kind, (17, inputs))
    ids = rng.integers(0, 17, (2, 5)).astype(np.int32)
    assert (np.asarray(look_up(array, form, jnp.asarray(ids))) == wanted[ids]).all()


def test_half_floats_of_every_kind_are_exact():
    """Subnormal, infinite and NaN super-scales: bits alone decide, so that no backend can flush them."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    blocks = np.zeros((len(halves), 34), np.uint8)
    blocks[:, :2] = halves[:, None].view(np.uint8)
    blocks[:, 2] = 1
    packed = pack(blocks.reshape(-1), GGMLType.Q8_0, (len(halves), 32))
    assert packed is not None
    found = np.asarray(expand(jnp.asarray(words(packed)), word_format(packed)))[0]
    assert np.array_equal(found, halves.astype(np.float32), equal_nan=True)


def test_sizes_against_the_file():
    ratio: dict[str, float] = {}
    for kind in BLOCKS:
        shape = 3, 2048
        nbytes = shape[0] * shape[1] // BLOCK_SIZES[kind].elements * BLOCK_SIZES[kind].nbytes
        packed = pack(np.zeros(nbytes, np.uint8), kind, shape)
        assert packed is not None
        ratio[kind.name] = words(packed).nbytes / nbytes
    assert {name: value for name, value in ratio.items() if value > LIMITS.get(name, 2.8)} == {}
    assert {name for name, value in ratio.items() if value <= 1.05} == set(FOUR_AND_EIGHT_BITS)
