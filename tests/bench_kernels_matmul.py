"""How fast the products by quantized weights are, as JSON rows: each kernel beside bf16 and beside its bound.

    PYTHONPATH=. python tests/bench_kernels_matmul.py --shapes 4096x4096 28672x4096 --rows 1 16 64 512 2048

A weight is multiplied by turns with others like it, so that caches do not hold it. `fraction` is the larger
of the times that its bytes at --bandwidth and its multiplications at --flops take, over the time measured.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels import matmul
from realm_jax.kernels.quantized import quantized_matmul
from realm_jax.kernels.words import WordFormat
from realm_jax.quant.containers import pack
from realm_jax.quant.wording import word_format

CACHE_BYTES = 256 << 20
"""More than what any device's cache holds."""

Product = Callable[[jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Device:
    """What bounds a product."""

    bandwidth: float  # bytes a second
    flops: float  # of bf16, a second


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


def products(
    kinds: Sequence[str], inputs: int, outputs: int
) -> Iterator[tuple[str, str, Callable[[jax.Array], jax.Array], Product]]:
    """Type, kernels, what makes a weight of a key, and the product by it."""
    for name in kinds:
        if name == "BF16":
            yield name, "xla", lambda key: jax.random.normal(key, (outputs, inputs), jnp.bfloat16), matmul
            continue
        form = format_of(GGMLType[name], inputs)
        for kernels in ("pallas", "xla"):

            def product(
                x: jax.Array, words: jax.Array, form: WordFormat = form, kernels: Any = kernels
            ) -> jax.Array:
                return quantized_matmul(x, words, form, dtype="bfloat16", kernels=kernels)

            yield name, kernels, lambda key, form=form: random_words(key, form, outputs), product


def seconds(product: Product, x: jax.Array, weights: list[jax.Array], repeats: int) -> float:
    """The median over repeats of the time of one product."""

    @jax.jit
    def all_of_them(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for weight in weights:
            x = x + 0 * product(x, weight)[:, :1]  # one after another
        return x

    jax.block_until_ready(all_of_them(x, weights))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(all_of_them(x, weights))
        found.append(time.perf_counter() - start)
    return median(found) / len(weights)


def measure(
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    kinds: Sequence[str],
    device: Device,
    *,
    repeats: int = 5,
    cache_bytes: int = CACHE_BYTES,
) -> list[dict[str, Any]]:
    """A row for each shape (outputs, inputs), number of rows, type and kernels."""
    found = []
    for outputs, inputs in shapes:
        for kind, kernels, make, product in products(kinds, inputs, outputs):
            first = jax.jit(make)(jax.random.key(0))
            copies = min(16, -(-cache_bytes // first.nbytes))
            weights = [first] + [jax.jit(make)(jax.random.key(i)) for i in range(1, copies)]
            for M in rows:
                took = seconds(product, jnp.ones((M, inputs), jnp.float32), weights, repeats)
                nbytes = first.nbytes + 4 * M * (inputs + outputs)
                bound = max(nbytes / device.bandwidth, 2 * M * inputs * outputs / device.flops)
                found.append(
                    {
                        "type": kind,
                        "kernels": kernels,
                        "outputs": outputs,
                        "inputs": inputs,
                        "rows": M,
                        "microseconds": float(f"{took * 1e6:.4g}"),
                        "bound_microseconds": float(f"{bound * 1e6:.4g}"),
                        "fraction": float(f"{bound / took:.3g}"),
                    }
                )
    return found


def _shape(text: str) -> tuple[int, int]:
    outputs, inputs = text.split("x")
    return int(outputs), int(inputs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shapes = ["6144x4096", "4096x4096", "28672x4096", "4096x14336", "128256x4096"]
    parser.add_argument("--shapes", nargs="+", type=_shape, default=list(map(_shape, shapes)), metavar="OxI")
    parser.add_argument("--rows", nargs="+", type=int, default=[4, 16, 64, 256, 512, 2048])
    parser.add_argument("--types", nargs="+", default=["BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second (default: an H200's)")
    parser.add_argument("--flops", type=float, default=790e12, help="of bf16, a second (default: an H200's)")
    given = parser.parse_args()
    device = Device(given.bandwidth, given.flops)
    rows = measure(given.shapes, given.rows, given.types, device, repeats=given.repeats)
    print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
