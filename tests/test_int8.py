"""Weights and caches rounded to int8: the arithmetic is described, and only who asks for it gets it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as gguf_py
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from native_cases import normal, random_blocks
from tiny import write_model

from realm_jax import LLM, RequestError, gguf, projections, runtime, weights
from realm_jax.architectures import read_config
from realm_jax.cache import Int8Cache, empty_cache
from realm_jax.config import MIN_ROWS, EngineConfig, Numerics
from realm_jax.experts import EachExpert
from realm_jax.ggml import GGMLType
from realm_jax.kernels import native, reference
from realm_jax.kernels.int8 import int8_matmul
from realm_jax.kernels.tiles import dequantize_tiles
from realm_jax.nodes import Biased, Dense, Int8, Quantized, Stacked
from realm_jax.projections import Stored, projection
from realm_jax.quant import dequantize
from realm_jax.quant.int8 import chunk_inputs, quantize_q8_0, round_chunks

XLA = Numerics("bfloat16", "bfloat16", "int8", "xla")
NATIVE = Numerics("bfloat16", "bfloat16", "int8", "native")
EXACT = Numerics("bfloat16", "bfloat16", "quantized", "native")
KERNELS = ("xla", "native") if native.problem() is None else ("xla",)
MODELS = ["llama-gqa-tied", "llama-bias", "llama-moe", "llama-mixed-types", "qwen3", "gemma2", "phi3"]

multiply = jax.jit(int8_matmul)


def rounded(rng: np.random.Generator, outputs: int, inputs: int) -> tuple[Any, Any]:
    """Codes and scales of a random weight, as the node holds them."""
    chunk = chunk_inputs(inputs)
    assert chunk is not None
    codes, scales = round_chunks(normal(rng, outputs, inputs), chunk)
    return tuple(jnp.asarray(part) for part in codes.swapaxes(0, 1)), jnp.asarray(scales.T)


def expanded(codes: Any, scales: Any) -> np.ndarray:
    """The weight in float64."""
    parts = [
        np.asarray(c, np.float64) * np.asarray(s, np.float64)[:, None]
        for c, s in zip(codes, scales, strict=True)
    ]
    return np.concatenate(parts, axis=1)


def test_the_chunk_is_the_smallest_from_192_to_512():
    known = {1: 1, 64: 64, 191: 191, 192: 192, 511: 511, 512: 256, 576: 192, 960: 192, 4096: 256, 8960: 224}
    assert {inputs: chunk_inputs(inputs) for inputs in known} == known
    for inputs in range(192, 2000):
        divisors = {inputs // count for count in range(1, 11) if inputs % count == 0}
        assert chunk_inputs(inputs) == min((n for n in divisors if 192 <= n <= 512), default=None)
    assert chunk_inputs(2 * 521) is None


@pytest.mark.parametrize("shape", [(5, 100, 1), (7, 1536, 512), (3, 576, 288)])
def test_codes_are_the_nearest_and_use_the_whole_range(shape: tuple[int, int, int]):
    rows, inputs, chunk = shape
    values = normal(np.random.default_rng(inputs), rows, inputs)
    values *= 10.0 ** np.arange(-3, rows - 3, dtype=np.float32)[:, None]
    values[1, :chunk] = 0
    codes, scales = round_chunks(values, chunk)
    chunks = values.reshape(codes.shape).astype(np.float64)
    largest = np.abs(chunks).max(-1)
    np.testing.assert_array_equal(scales, largest.astype(np.float32) / np.float32(127))
    np.testing.assert_array_equal(np.abs(codes.astype(int)).max(-1), np.where(largest > 0, 127, 0))
    assert (np.abs(codes * scales[..., None] - chunks) <= 0.50001 * scales[..., None]).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(33, 100), (65, 576), (48, 1536)])
@pytest.mark.parametrize("lead", [(1,), (2, 3), (37,)])
def test_the_product_is_that_of_rounded_rows_and_rounded_weights(
    outputs: int, inputs: int, lead: tuple[int, ...]
):
    rng = np.random.default_rng(inputs)
    codes, scales = rounded(rng, outputs, inputs)
    x = normal(rng, *lead, inputs) * 10.0 ** rng.integers(-20, 20, (*lead, 1)).astype(np.float32)
    chunks = x.astype(np.float64).reshape(*lead, len(codes), -1)
    step = np.abs(chunks).max(-1, keepdims=True) / 127
    place = chunks / step
    chunks[np.abs(place % 1 - 0.5) < 1e-3] = 0  # where float32 may choose the other code
    place = np.where(chunks == 0, 0, np.rint(place))
    weight = expanded(codes, scales)
    found = multiply(jnp.asarray(chunks.reshape(x.shape), jnp.float32), codes, scales)
    assert found.shape == (*lead, outputs) and found.dtype == jnp.float32
    steps = (place * step).reshape(x.shape)
    bound = (len(codes) + 4) * 2.0**-24 * (np.abs(steps) @ np.abs(weight.T))
    assert (np.abs(found - steps @ weight.T) <= bound).all()


def test_rows_of_zeros_and_of_what_is_not_finite():
    codes, scales = rounded(np.random.default_rng(0), 8, 576)
    x = np.ones((5, 576), np.float32)
    x[0], x[1], x[2, 3], x[3, 3] = 0, 1e-39, np.nan, np.inf
    found = np.asarray(multiply(jnp.asarray(x), codes, scales))
    assert (found[:2] == 0).all() and not np.isfinite(found[2:4]).any() and np.isfinite(found[4]).all()


@pytest.mark.parametrize(("outputs", "inputs"), [(96, 64), (67, 576), (40, 1536)])
def test_a_rows_bits_do_not_depend_on_the_others(outputs: int, inputs: int):
    rng = np.random.default_rng(outputs)
    codes, scales = rounded(rng, outputs, inputs)
    row, found = normal(rng, inputs), set()
    for M in range(1, 41, 1 if inputs < 1000 else 5):  # programs of many chunks take longer to compile
        x, place = normal(rng, M, inputs), int(rng.integers(M))
        x[place] = row
        found.add(np.asarray(multiply(jnp.asarray(x), codes, scales)[place]).tobytes())
    assert len(found) == 1


@pytest.mark.parametrize(("M", "rows"), [(1, MIN_ROWS), (3, MIN_ROWS), (7, 7)])
def test_no_product_has_fewer_rows_than_are_fast(M: int, rows: int):
    codes, scales = rounded(np.random.default_rng(0), 8, 576)
    program = multiply.lower(jnp.ones((M, 576), jnp.float32), codes, scales).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all(f"(tensor<{rows}x192xi8>" in line for line in products)


@pytest.mark.parametrize("M", [1, 6])
def test_gradients_are_those_of_the_dequantized_weight(M: int):
    rng = np.random.default_rng(M)
    codes, scales = rounded(rng, 33, 576)
    x, probe = jnp.asarray(normal(rng, M, 576)), normal(rng, M, 33)
    found = jax.jit(jax.grad(lambda x: (int8_matmul(x, codes, scales) * probe).sum()))(x)
    np.testing.assert_allclose(found, probe @ expanded(codes, scales), atol=1e-4)


def rows_for_q8_0(seed: int) -> np.ndarray:
    """Rows of many sizes, with blocks of zeros, and with numbers in the middle of two codes."""
    rng = np.random.default_rng(seed)
    values = normal(rng, 70, 6 * 32) * 10.0 ** rng.integers(-9, 5, (70, 1)).astype(np.float32)
    values[3, 32:64] = 0
    values[4:20] = rng.integers(-253, 254, (16, 192)) / np.float32(2)
    values[4:20, ::32] = 127
    values[4:20, 1::32] = np.nextafter(np.float32(0.5), np.float32(0))
    return values


@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_ggmls(seed: int):
    values = rows_for_q8_0(seed)
    wanted = gguf_py.quants.quantize(values, gguf_py.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(quantize_q8_0(values), wanted)


def stored(values: np.ndarray, kind: GGMLType) -> Stored:
    """The values as a file holds them in a type of plain numbers, or in Q8_0."""
    shape = values.shape[0], values.shape[1]
    if kind is GGMLType.Q8_0:
        data = gguf_py.quants.quantize(values, gguf_py.GGMLQuantizationType.Q8_0)
    else:
        data = values.astype(
            {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}[kind.name]
        )
    return Stored(data.view(np.uint8).reshape(-1), kind, shape)


@pytest.mark.parametrize("kind", projections.NUMBERS)
def test_native_tiles_are_those_of_a_file_in_q8_0(kind: GGMLType, monkeypatch: pytest.MonkeyPatch):
    """However the rows fall into parts, and the slices that are in memory at a time."""
    sizes: list[int] = []
    monkeypatch.setattr(projections, "CHUNK", 2 * 16 * 192)
    monkeypatch.setattr(projections, "quantize_q8_0", lambda v: sizes.append(len(v)) or quantize_q8_0(v))
    values = rows_for_q8_0(7).astype({"F16": "<f2", "BF16": ml_dtypes.bfloat16}.get(kind.name, "<f4"))
    values = np.where(np.isfinite(values), values, 1).astype(np.float32)
    parts = np.split(values, [37, 60])
    found = projection([stored(part, kind) for part in parts], NATIVE)
    wanted = projection([stored(values, GGMLType.Q8_0)], EXACT)
    assert isinstance(found, Quantized) and isinstance(wanted, Quantized)
    assert sizes == [32, 32, 6]
    assert (found.shape, found.form) == (wanted.shape, wanted.form) and type(found) is type(wanted)
    assert np.asarray(found.tiles).tobytes() == np.asarray(wanted.tiles).tobytes()


@pytest.mark.parametrize("kind", [GGMLType.Q4_1, GGMLType.Q6_K, GGMLType.Q2_K, GGMLType.Q8_0])
def test_native_keeps_what_is_rounded_already(kind: GGMLType):
    part = Stored(random_blocks(np.random.default_rng(kind), kind, (48, 256)), kind, (48, 256))
    found = projection([part], NATIVE)
    assert isinstance(found, Quantized)
    weight = dequantize_tiles(found.tiles, found.form)
    np.testing.assert_array_equal(weight, dequantize(part.data, kind, part.shape))


@pytest.mark.parametrize("kinds", [("F32", "F32"), ("F16", "Q4_K"), ("Q8_0", "BF16")])
def test_xla_holds_the_rounded_values_of_any_type(kinds: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(projections, "CHUNK", 16 * 768)
    rng, parts = np.random.default_rng(0), []
    for kind, rows in zip((GGMLType[name] for name in kinds), (21, 30), strict=True):
        if kind in projections.NUMBERS:
            parts.append(stored(normal(rng, rows, 768), kind))
        else:
            parts.append(Stored(random_blocks(rng, kind, (rows, 768)), kind, (rows, 768)))
    values = np.concatenate([dequantize(part.data, part.kind, part.shape) for part in parts])
    node = projection(parts, XLA)
    assert isinstance(node, Int8) and node.shape == (768, 51)
    codes, scales = round_chunks(values, 192)
    np.testing.assert_array_equal(np.stack(node.codes, axis=1), codes)
    np.testing.assert_array_equal(node.scales, scales.T)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(node)) == projections.planned_bytes(parts, XLA)


def test_what_has_no_chunks_or_no_blocks_stays_dense():
    values = normal(np.random.default_rng(0), 5, 2 * 521)
    for numerics in (XLA, NATIVE):
        assert isinstance(projection([stored(values, GGMLType.F16)], numerics), Dense)
    whole = Stored(np.ones(5 * 64, np.uint8), GGMLType.I8, (5, 64))
    assert isinstance(projection([whole], NATIVE), Dense)


def matrices(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """The nodes of matrices by path: without their biases, and one by one where several are stacked."""
    for name, found in params.items():
        here = (*path, name)
        node = found.kernel if isinstance(found, Biased) else found
        if isinstance(node, dict):
            yield from matrices(node, here)
        elif isinstance(node, EachExpert):
            for kind in ("gate_up", "down"):
                for part in getattr(node, kind):
                    yield "/".join((*here, kind, "kernel")), part
        elif name not in ("scale", "global", "local"):
            for part in node.parts if isinstance(node, Stacked) else (node,):
                yield "/".join(here), part


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("numerics", [XLA, NATIVE], ids=["xla", "native"])
def test_planned_memory_is_what_the_model_holds(fixtures: Path, case: str, numerics: Numerics):
    with gguf.open(fixtures / "arch" / case / "model.gguf") as file:
        config = read_config(file)
        params = weights.load(file, config, numerics=numerics, context=256)
        assert weights.planned_bytes(file, config, numerics) == weights.resident_bytes(params)
    spared = ("down/kernel", "embedding", "head") if numerics is XLA else ()
    for path, node in matrices(params):
        is_spared = path.endswith((*spared, "router/kernel")) or (numerics is NATIVE and node.shape[0] % 32)
        assert isinstance(node, Dense if is_spared else (Int8, Quantized)), path


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_are_near_those_of_the_weights_as_they_are(tmp_path: Path, kernels: str):
    path = write_model(tmp_path / "m.gguf", width=384, heads=6, ffn=576)
    ids = list(range(3, 80))
    plain = LLM(path, ctx_size=128, dtype="float32").logits(ids)
    llm = LLM(path, ctx_size=128, weights="int8", kernels=kernels)
    assert llm.model.numerics.weights == "int8"
    error = (llm.logits(ids) - plain).std() / plain.std()
    assert 0.01 < error < 0.1


@pytest.mark.parametrize("kernels", ["auto", *KERNELS])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_only_who_asks_gets_it(kernels: Any, dtype: Any):
    if (kernels, dtype) != ("native", "float32"):
        assert runtime.resolve_numerics(EngineConfig(kernels=kernels, dtype=dtype)).weights != "int8"
    asked = EngineConfig(kernels=kernels, dtype=dtype, weights="int8")
    if dtype != "float32":
        assert runtime.resolve_numerics(asked).weights == "int8"
        return
    with pytest.raises(RequestError, match=r"weights='int8' .*; use dtype='bfloat16' or weights='dense'"):
        runtime.resolve_numerics(asked)


def test_int8_caches_are_exact_but_for_rounding() -> None:
    """What is written is within half a step; what is attended to is what was written."""
    draw = np.random.default_rng(3)
    B, T, N, K, H, C = 2, 70, 6, 2, 16, 256
    q, k, v = (draw.standard_normal((B, T, heads, H)).astype(np.float32) for heads in (N, K, K))
    k[0, 3] = 0.0
    positions = jnp.asarray(np.tile(np.arange(T, dtype=np.int32), (B, 1)))
    cache = empty_cache((B + 1, K, C, H), Numerics("bfloat16", "int8", "dense", "xla"))
    slots = jnp.array([2, 0], jnp.int32)
    cache = cache.write(jnp.asarray(k), jnp.asarray(v), slots, positions)
    assert isinstance(cache, Int8Cache)
    kept = [
        np.asarray(codes, np.float32) * np.asarray(scale)[..., None]
        for codes, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
    ]
    for found, given in zip(kept, (k, v), strict=True):
        step = np.abs(given).max(-1, keepdims=True) / 127
        assert (np.abs(found[[2, 0], :, :T].swapaxes(1, 2) - given) <= 0.5001 * step).all()
    out = cache.attend(jnp.asarray(q), slots, positions, scale=0.25, softcap=None, window=None)
    keys, values = (jnp.asarray(x[[2, 0]]) for x in kept)
    plain = reference.attention(
        jnp.asarray(q), keys, values, positions, scale=0.25, softcap=None, window=None
    )
    np.testing.assert_allclose(out, plain, atol=2e-2)  # bf16 products
