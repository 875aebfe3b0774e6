"""Products by quantized weights: what they take, beside XLA's, bf16's and the bound of the device.

A weight is multiplied by turns with others like it, so that caches do not hold it.
"""

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_device import Device

from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels import matmul
from realm_jax.kernels.pallas import matmul as chosen
from realm_jax.kernels.pallas import matmul_gpu, matmul_tpu, tuning
from realm_jax.kernels.quantized import quantized_matmul
from realm_jax.kernels.words import WordFormat
from realm_jax.quant.containers import pack
from realm_jax.quant.wording import word_format

Product = Callable[[jax.Array, jax.Array], jax.Array]
TOLERANCE = 0.03


@dataclass(frozen=True)
class Case:
    """Weights of a layer, the numbers of rows that they are multiplied by, and their types."""

    shapes: tuple[tuple[int, int], ...]  # outputs, inputs
    rows: tuple[int, ...]
    types: tuple[str, ...]
    cache_bytes: int  # more than what a device's cache holds


DEVICE = Case(
    ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    (4, 16, 64, 256, 512, 2048),
    ("BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"),
    256 << 20,
)
INTERPRETED = Case(((48, 64),), (4,), ("BF16", "Q4_0"), 1)


def measure(where: Device, rounds: int) -> list[dict[str, Any]]:
    """A row for each shape, number of rows and type: microseconds of each implementation, and the bound."""
    case = INTERPRETED if where.target.interpret else DEVICE
    return [
        _row(name, outputs, inputs, rows, case, where, rounds)
        for outputs, inputs in case.shapes
        for name in case.types
        for rows in case.rows
    ]


def _row(
    name: str, outputs: int, inputs: int, rows: int, case: Case, where: Device, rounds: int
) -> dict[str, Any]:
    make, products = _products(name, inputs, outputs)
    first = jax.jit(make)(jax.random.key(0))
    copies = min(16, -(-case.cache_bytes // first.nbytes))
    weights = [first] + [jax.jit(make)(jax.random.key(i)) for i in range(1, copies)]
    x = jnp.ones((rows, inputs), jnp.float32)
    taken = {who: 1e6 * seconds(product, x, weights, rounds) for who, product in products.items()}
    bound = where.bound(first.nbytes + 4 * rows * (inputs + outputs), 2 * rows * inputs * outputs)
    best = taken.get("pallas", taken["xla"])
    return {
        "kernel": "matmul",
        "type": name,
        "outputs": outputs,
        "inputs": inputs,
        "rows": rows,
        "microseconds": {who: round(each, 2) for who, each in taken.items()},
        "bound_microseconds": None if bound is None else round(1e6 * bound, 2),
        "of_bound": None if bound is None else round(1e6 * bound / best, 3),
    }


def _products(
    name: str, inputs: int, outputs: int
) -> tuple[Callable[[jax.Array], jax.Array], dict[str, Product]]:
    """What makes a weight of a key, and the products by it."""
    if name == "BF16":
        return lambda key: jax.random.normal(key, (outputs, inputs), jnp.bfloat16), {"xla": matmul}
    form = format_of(GGMLType[name], inputs)

    def by(kernels: Any) -> Product:
        return lambda x, words: quantized_matmul(x, words, form, dtype="bfloat16", kernels=kernels)

    return lambda key: random_words(key, form, outputs), {each: by(each) for each in ("pallas", "xla")}


def format_of(kind: GGMLType, inputs: int) -> WordFormat:
    """The words of this type: a row of zeros shows it."""
    block = BLOCK_SIZES[kind]
    packed = pack(np.zeros(inputs // block.elements * block.nbytes, np.uint8), kind, (1, inputs))
    assert packed is not None, f"{kind.name} is no block format"
    return word_format(packed)


def random_words(key: jax.Array, form: WordFormat, outputs: int) -> jax.Array:
    """Random codes, made on the device; every super-factor is small and finite."""
    words = jax.random.bits(key, (form.units, form.height, outputs), jnp.uint32).view(jnp.int32)
    codes, supers, _ = form.parts
    half = int(np.float16(2.0**-form.bits / form.inputs**0.5).view(np.uint16))
    whole = int(np.float32(2.0**-form.bits / form.inputs**0.5).view(np.int32))
    factor = half | half << 16 if form.factor == "float16" else whole
    return words.at[:, codes : codes + supers].set(factor)


def seconds(product: Product, x: jax.Array, weights: list[jax.Array], rounds: int) -> float:
    """The median over rounds of the time of one product."""

    @jax.jit
    def all_of_them(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for weight in weights:
            x = x + 0 * product(x, weight)[:, :1]  # one after another
        return x

    jax.block_until_ready(all_of_them(x, weights))
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(all_of_them(x, weights))
        found.append(time.perf_counter() - start)
    return median(found) / len(weights)


def tune(where: Device, rounds: int) -> dict[str, dict[str, tuning.Sizes]]:
    """The block sizes that take the least time for few and for many rows: summed over types, relative."""
    case = INTERPRETED if where.target.interpret else DEVICE
    types = [name for name in case.types if name != "BF16"]
    found = {}
    for bucket, rows in (("few", 16), ("many", 512)):
        candidates = list(_candidates(bucket, where))
        times = [_times(name, case, rows, candidates, where, rounds) for name in types]
        relative = np.nan_to_num([row / np.min(row) for row in times], nan=1.0)  # NaN: no candidate runs
        found[f"{bucket}/bfloat16"] = candidates[int(relative.sum(axis=0).argmin())]
    return {f"matmul_{where.target.platform}": found}


def _candidates(bucket: str, where: Device) -> Iterator[dict[str, int]]:
    """The usual sizes first."""
    usual = tuning.sizes(f"matmul_{where.target.platform}", where.kind, f"{bucket}/bfloat16")
    yield dict(usual)
    if where.target.interpret:
        return
    if where.target.platform == "tpu":
        for rows, outputs, inputs in itertools.product((64, 256, 512), (256, 512, 1024), (512, 1024, 2048)):
            yield {"rows": rows, "outputs": outputs, "inputs": inputs}
        return
    is_few = bucket == "few"
    sizes = itertools.product(
        (16, 32, 64) if is_few else (64, 128, 256),
        (32, 64, 128),
        (256, 512, 1024) if is_few else (0,),
        (4, 8),
        (2, 3, 4),
    )
    for rows, outputs, programs, warps, stages in sizes:
        yield {"rows": rows, "outputs": outputs, "programs": programs, "warps": warps, "stages": stages}


def _times(
    name: str, case: Case, rows: int, candidates: list[dict[str, int]], where: Device, rounds: int
) -> np.ndarray:
    """What each candidate takes for a type; infinite for one that does not run, or is wrong."""
    outputs, inputs = case.shapes[0]
    form = format_of(GGMLType[name], inputs)
    words = random_words(jax.random.key(0), form, outputs)
    x = jax.random.normal(jax.random.key(1), (rows, inputs), jnp.float32)
    expected = quantized_matmul(x, words, form, dtype="bfloat16", kernels="xla")
    found = []
    for sizes in candidates:
        try:
            product = _with_sizes(sizes, form, where)
            error = jnp.abs(product(x, words) - expected).max() / jnp.abs(expected).max()
            is_right = float(error) < TOLERANCE
            found.append(seconds(product, x, [words], rounds) if is_right else np.inf)
        except Exception as problem:  # of the compiler: too much shared memory, for one
            print(f"{name}, {rows} rows, {sizes}: {str(problem).splitlines()[0][:100]}", file=sys.stderr)
            found.append(np.inf)
    return np.array(found)


def _with_sizes(sizes: tuning.Sizes, form: WordFormat, where: Device) -> Product:
    is_tpu = where.target.platform == "tpu"
    kernel = matmul_tpu.matmul if is_tpu else matmul_gpu.matmul
    blocks: Any = (matmul_tpu.Blocks if is_tpu else matmul_gpu.Blocks)(**sizes)

    def product(x: jax.Array, words: jax.Array) -> jax.Array:
        fitting = chosen.fitted(blocks, x.shape[0])
        padded = jnp.pad(x.astype(jnp.bfloat16), ((0, 0), (0, form.padded - form.inputs)))
        return kernel(padded, words[None], None, form, fitting, interpret=where.target.interpret)

    return product
