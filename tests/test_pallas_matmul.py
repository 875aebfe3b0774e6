"""Products by words, for GPU and TPU: interpreted against float64, lowered for devices that are not here."""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from native_cases import BLOCKS, normal, random_blocks
from test_words import QUICK, random_words

from realm_jax import quant
from realm_jax.ggml import GGMLType
from realm_jax.kernels.pallas.matmul import matmul
from realm_jax.kernels.pallas.tuning import Target
from realm_jax.kernels.quantized import quantized_matmul
from realm_jax.kernels.words import WordFormat
from realm_jax.quant.containers import pack
from realm_jax.quant.wording import word_format, words

INTERPRETED = [Target("gpu", "cpu", interpret=True), Target("tpu", "cpu", interpret=True)]
DEVICES = [Target("gpu", "NVIDIA H200", interpret=False), Target("tpu", "TPU v5e", interpret=False)]
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")

by_platform = pytest.mark.parametrize("where", INTERPRETED, ids=lambda where: where.platform)


@partial(jax.jit, static_argnums=(2, 3, 4), compiler_options=QUICK)
def multiply(x: jax.Array, array: jax.Array, form: WordFormat, dtype: str, where: Target) -> jax.Array:
    return matmul(x.astype(dtype), array, form, where)


def errors(x: np.ndarray, array: jax.Array, form: WordFormat, weight: np.ndarray, dtype: str, where: Target):
    """What the kernel's product is off, in units of what float32 sums may be."""
    found = np.asarray(multiply(jnp.asarray(x), array, form, dtype, where), np.float64)
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
    x, weight = (each.astype(kind).astype(np.float64) for each in (x, weight))
    assert found.shape == (len(x), len(weight))
    return np.abs(found - x @ weight.T) / (2e-6 * (np.abs(x) @ np.abs(weight).T))


def moderate_words(
    rng: np.random.Generator, kind: GGMLType, shape: tuple[int, int]
) -> tuple[jax.Array, WordFormat, np.ndarray]:
    """As `random_words`, the weights of each output alike in size."""
    data = random_blocks(rng, kind, shape)
    packed = pack(data, kind, shape)
    assert packed is not None
    return jnp.asarray(words(packed)), word_format(packed), quant.dequantize(data, kind, shape)


LOWERED = [GGMLType.Q4_K, GGMLType.Q8_0, GGMLType.Q6_K, GGMLType.IQ4_NL, GGMLType.MXFP4]
"""One of each container, length of run and kind of factor: formats are data to both kernels."""


@pytest.mark.parametrize(
    ("kind", "where"),
    [(kind, INTERPRETED[0]) for kind in BLOCKS] + [(kind, INTERPRETED[1]) for kind in LOWERED],
    ids=lambda value: getattr(value, "platform", getattr(value, "name", None)),
)
def test_the_product_is_of_the_dequantized_weights(kind: GGMLType, where: Target):
    rng = np.random.default_rng(kind)
    array, form, weight = moderate_words(rng, kind, (37, 256))
    x = normal(rng, 5, 256)
    assert errors(x, array, form, weight, "float32", where).max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "where"),
    [(rows, INTERPRETED[0]) for rows in (1, 4, 5, 16, 33, 64, 130)]
    + [(rows, INTERPRETED[1]) for rows in (4, 130)],
    ids=lambda value: getattr(value, "platform", str(value)),
)
def test_any_number_of_rows_and_outputs(rows: int, dtype: str, where: Target):
    rng = np.random.default_rng(rows)
    kind = GGMLType.Q4_1 if rows % 2 else GGMLType.Q8_0
    array, form, weight = moderate_words(rng, kind, (int(rng.integers(130, 300)) | 1, 288))
    assert errors(normal(rng, rows, 288), array, form, weight, dtype, where).max() <= 1


@by_platform
def test_a_row_depends_on_itself_alone(where: Target):
    """Neither on its neighbours nor, up to 64 rows, on how many they are: splits are the weight's."""
    rng = np.random.default_rng(0)
    array, form, _ = moderate_words(rng, GGMLType.Q4_K, (70, 512))
    x = normal(rng, 64, 512)
    whole = multiply(jnp.asarray(x), array, form, "bfloat16", where)
    for rows in (5, 33):
        few = multiply(jnp.asarray(x[-rows:]), array, form, "bfloat16", where)
        assert np.asarray(few).tobytes() == np.asarray(whole[-rows:]).tobytes()
    other = np.concatenate([normal(rng, 63, 512) * 100, x[-1:]])
    found = multiply(jnp.asarray(other), array, form, "bfloat16", where)
    assert np.asarray(found[-1]).tobytes() == np.asarray(whole[-1]).tobytes()


@by_platform
@pytest.mark.parametrize("row", [32, 34])
def test_a_broken_scale_is_seen(where: Target, row: int):
    """Row 32 of Q8_0's record holds scales, row 34 of Q5_1's minima: these tests' bound is no formality."""
    rng = np.random.default_rng(row)
    array, form, weight = moderate_words(rng, GGMLType.Q8_0 if row == 32 else GGMLType.Q5_1, (33, 128))
    broken = array.at[0, row, 7].set(array[0, row, 7] ^ 0x0010)  # one of the last bits of a float16
    off = errors(normal(rng, 4, 128), broken, form, weight, "float32", where)
    assert off[:, 7].max() > 1 and np.delete(off, 7, axis=1).max() <= 1


@pytest.mark.parametrize("kernels", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_door_is_one_product_and_one_gradient(kernels: Literal["reference", "xla", "pallas"], dtype: str):
    rng = np.random.default_rng(3)
    array, form, weight = random_words(rng, GGMLType.Q4_0, (33, 288))
    x, pull = normal(rng, 2, 3, 288), normal(rng, 2, 3, 33)

    def both(x: jax.Array, array: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, back = jax.vjp(lambda x: quantized_matmul(x, array, form, dtype=dtype, kernels=kernels), x)
        return y, back(jnp.asarray(pull))[0]

    y, dx = jax.jit(both, compiler_options=QUICK)(jnp.asarray(x), array)
    bound = 2e-6 if dtype == "float32" or kernels == "reference" else 2**-7
    wide = weight.astype(np.float64)
    for found, left, right in ((y, x, wide.T), (dx, pull, wide)):
        assert found.dtype == jnp.float32
        assert (np.abs(found - left @ right) <= bound * (np.abs(left) @ np.abs(right))).all()
    assert ("pallas_call" in str(jax.make_jaxpr(both)(x, array))) == (kernels == "pallas")


def abstract_words(kind: GGMLType, inputs: int, outputs: int) -> tuple[jax.ShapeDtypeStruct, WordFormat]:
    packed = pack(random_blocks(np.random.default_rng(0), kind, (1, 256)), kind, (1, 256))
    assert packed is not None
    form = replace(word_format(packed), inputs=inputs)
    return jax.ShapeDtypeStruct((form.units, form.height, outputs), jnp.int32), form


@pytest.mark.parametrize("where", DEVICES, ids=lambda where: where.platform)
@pytest.mark.parametrize("kind", LOWERED)
def test_the_kernels_lower_for_devices_that_are_not_here(kind: GGMLType, where: Target):
    """Few rows and many, both types, outputs that fill no tile; each container, run and kind of factor."""
    array, form = abstract_words(kind, 4096, 4099)
    for rows, dtype in ((4, "bfloat16"), (4, "float32"), (512, "bfloat16"), (512, "float32")):
        program = jax.jit(lambda x, array: matmul(x, array, form, where))
        shapes = jax.ShapeDtypeStruct((rows, 4096), jnp.dtype(dtype)), array
        if where.platform == "gpu":
            text = program.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
            assert "__gpu$xla.gpu.triton" in text
        else:
            assert "tpu_custom_call" in jax.export.export(program, platforms=("tpu",))(*shapes).mlir_module()
