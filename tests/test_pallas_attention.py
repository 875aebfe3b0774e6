"""Attention kernels for GPU and TPU, interpreted, against NumPy in float64; and that they lower for both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import ROUNDING, Call, Case, assert_close, call
from jax import export

from realm_jax import LLM, SamplingParams, programs
from realm_jax.config import Kernels
from realm_jax.errors import CapacityError, RequestError, UnsupportedError
from realm_jax.kernels import attention
from realm_jax.kernels.pallas import attention as chosen
from realm_jax.kernels.pallas import attention_gpu, attention_tpu, tuning

SPLIT = attention_gpu.Blocks(rows=16, positions=64, split=128, warps=4, stages=2)
WHOLE = attention_gpu.Blocks(rows=32, positions=128, split=0, warps=4, stages=2)
WALKED = attention_tpu.Blocks(rows=32, positions=128)
KERNELS = pytest.mark.parametrize("blocks", [SPLIT, WHOLE, WALKED], ids=["split", "whole", "tpu"])

IDLE = (0, 0)
DECODE = (0, 1), (63, 1), (64, 1), (319, 1), IDLE
CASES = {
    "decode": Case(DECODE, 1, 8, 2, 64, 320),
    "decode, one head each": Case(((5, 1), (226, 1)), 1, 2, 2, 80, 256, "bfloat16", 100, 30.0),
    "decode, int8": Case(((448 - 1, 1), (127, 1), IDLE), 1, 8, 2, 32, 448, "int8", has_sinks=True),
    "verify": Case(((250, 5), (0, 5), (120, 3)), 5, 4, 1, 40, 256, "float32", 5, None, True),
    "verify, bits": Case(((190, 2),), 2, 2, 1, 256, 192, "uint16", is_in_order=True),
    "chunk": Case(((100, 40), (0, 7), IDLE), 40, 6, 2, 96, 192, "bfloat16", None, 20.0),
    "chunk, window": Case(((190, 64), (0, 64)), 64, 4, 2, 16, 320, "float32", 70, None, True),
    "chunk, int8": Case(((300, 20),), 20, 3, 1, 128, 320, "int8", 150, 50.0),
}


def interpreted(blocks: chosen.Blocks) -> tuning.Target:
    platform = "tpu" if isinstance(blocks, attention_tpu.Blocks) else "gpu"
    return tuning.Target(platform, "cpu", interpret=True)


def run(case: Case, made: Call, blocks: chosen.Blocks | None, target: tuning.Target) -> np.ndarray:
    def attend(arrays: tuple[Any, ...], sinks: Any) -> Any:
        return chosen.attention(*arrays, **case.how, sinks=sinks, blocks=blocks, target=target)

    return np.asarray(jax.jit(attend)(made.arrays, made.sinks))


@KERNELS
@pytest.mark.parametrize("name", CASES)
def test_attention_is_softmax_over_what_is_seen_and_reads_no_other_block(name: str, blocks: chosen.Blocks):
    """Whatever is not to be read is NaN, which any use of it would spread."""
    case = CASES[name]
    made = call(case, hidden_block=blocks.positions)
    assert_close(run(case, made, blocks, interpreted(blocks)), case, made)


def test_a_float16_cache_is_multiplied_on_gpus_alone():
    case = Case(((70, 1),), 1, 2, 1, 64, 128, "float16")
    made = call(case)
    assert_close(run(case, made, WHOLE, interpreted(WHOLE)), case, made)
    with pytest.raises(UnsupportedError, match=r"float16.*bfloat16"):
        run(case, made, WALKED, interpreted(WALKED))


@KERNELS
@pytest.mark.parametrize("case", [CASES["decode"], CASES["chunk"]], ids=["decode", "chunk"])
def test_bits_of_a_row_are_the_same_alone_and_in_a_larger_cache(case: Case, blocks: chosen.Blocks):
    made = call(case)
    together = run(case, made, blocks, interpreted(blocks))
    q, k, v, _, _, slots, positions = made.arrays
    row = 1
    wider = [jnp.pad(x, ((0, 0), (0, 0), (0, 3 * 64), (0, 0))) for x in (k, v)]
    mine = jnp.where(positions < case.C, positions, case.C + 3 * 64)[row : row + 1]
    alone = replace(made, arrays=(q[row : row + 1], *wider, None, None, slots[row : row + 1], mine))
    found = run(case, alone, blocks, interpreted(blocks))
    real = made.is_real[row]
    assert found[0, real].tobytes() == together[row, real].tobytes()


@pytest.mark.parametrize("kernels", ["reference", "xla"])
@pytest.mark.parametrize("name", ["verify", "chunk, window"])
def test_other_implementations_have_sinks_too(name: str, kernels: Kernels):
    case = CASES[name]
    made = call(case)
    found = attention(*made.arrays, **case.how, kernels=kernels, sinks=made.sinks)
    assert_close(np.where(made.is_real[..., None, None], found, 0), case, made)


def test_gradients_through_the_door_are_the_formulas():
    case = Case(((60, 5), (3, 5)), 5, 4, 2, 16, 128, "float32", 50, 20.0, has_sinks=True)
    made = call(case)
    q, k, v, _, _, slots, positions = made.arrays
    probe = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def door(kernels: Kernels) -> Any:
        def weighed(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            how = {**case.how, "kernels": kernels, "sinks": sinks}
            return (attention(q, k, v, None, None, slots, positions, **how) * probe).sum()

        return jax.jit(jax.grad(weighed, (0, 1, 2, 3)))(q, k, v, made.sinks)

    def formula(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        keys, values = (jnp.repeat(x[slots], case.N // case.K, axis=1) for x in (k, v))
        scores = jnp.einsum("btnh,bnch->bntc", q, keys, precision="highest") * case.how["scale"]
        scores = 20.0 * jnp.tanh(scores / 20.0)
        distance = positions[:, None, :, None] - jnp.arange(case.C, dtype=jnp.int32)[None, None, None]
        scores = jnp.where((distance >= 0) & (distance < 50), scores, -jnp.inf)
        sink = jnp.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
        return (jnp.einsum("bntc,bnch->btnh", weights, values, precision="highest") * probe).sum()

    wanted = jax.jit(jax.grad(formula, (0, 1, 2, 3)))(q, k, v, made.sinks)
    for kernels in ("pallas", "reference"):
        for one, other in zip(door(kernels), wanted, strict=True):
            assert np.abs(other).max() > 0.05
            np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)


def test_the_door_calls_a_kernel():
    made = call(CASES["chunk"])

    def traced(kernels: Kernels) -> str:
        how = {**CASES["chunk"].how, "kernels": kernels}
        return str(jax.make_jaxpr(lambda *arrays: attention(*arrays, **how))(*made.arrays))

    assert "pallas_call" in traced("pallas")
    assert "pallas_call" not in traced("xla")


def shapes(H: int, T: int, dtype: str, B: int = 2, C: int = 1472) -> tuple[Any, ...]:
    S = jax.ShapeDtypeStruct
    scale = S((B + 1, 2, C), jnp.float32) if dtype == "int8" else None
    cache = S((B + 1, 2, C, H), jnp.dtype(dtype))
    row = S((B,), jnp.int32)
    return (
        S((B, T, 8, H), jnp.float32),
        cache,
        cache,
        scale,
        scale,
        row,
        S((B, T), jnp.int32),
        S((8,), jnp.float32),
    )


def on_device(platform: Any, **how: Any) -> Any:
    target = tuning.Target(platform, {"gpu": "NVIDIA H200", "tpu": "TPU v5 lite"}[platform], interpret=False)
    how = {"scale": 0.1, "softcap": 30.0, "window": 1000, **how}
    return jax.jit(lambda *x: chosen.attention(*x[:-1], sinks=x[-1], target=target, **how))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("H", [64, 80, 128, 256])
def test_every_kernel_lowers_for_its_device(H: int, dtype: str):
    for T, calls in ((1, 2), (64, 1)):  # decoding is split, and combined
        args = shapes(H, T, dtype)
        on_gpu, on_tpu = on_device("gpu").trace(*args), on_device("tpu")
        assert on_gpu.lower(lowering_platforms=("cuda",)).as_text().count("gpu$xla.gpu.triton") == calls
        assert "tpu_custom_call" in export.export(on_tpu, platforms=("tpu",))(*args).mlir_module()
        # float32 is not rounded: two products, of two heads on TPUs
        for program, products in ((on_gpu, 2), (on_tpu.trace(*args), 4)):
            highest = str(program.jaxpr).count("(Precision.HIGHEST, Precision.HIGHEST)")
            assert highest == (products if dtype == "float32" else 0)


def test_a_cache_that_a_gpu_cannot_address_is_refused():
    with pytest.raises(CapacityError, match=r"2,214,592,512.*--max-num-seqs"):
        on_device("gpu").trace(*shapes(128, 1, "int8", B=32, C=1 << 18))


def test_block_sizes_come_from_the_most_special_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    table = tmp_path / "table.json"
    entry = {"rows": 16, "positions": 16, "split": 0, "warps": 2, "stages": 1}
    tuning.write(table, "NVIDIA H", "attention_gpu", {"decode": entry})
    tuning.write(table, "NVIDIA H2", "attention_gpu", {"decode/bfloat16": entry | {"warps": 8}})
    usual = tuning.sizes("attention_gpu", "NVIDIA H200", "decode/bfloat16/128/int8")
    compiled_otherwise = programs._surroundings()
    monkeypatch.setenv(tuning.VARIABLE, str(table))
    assert programs._surroundings() != compiled_otherwise
    assert tuning.sizes("attention_gpu", "NVIDIA H200", "decode/bfloat16/128/int8")["warps"] == 8
    assert tuning.sizes("attention_gpu", "NVIDIA H200", "decode/float32/128/float32")["warps"] == 2
    assert tuning.sizes("attention_gpu", "NVIDIA A100", "decode/bfloat16/128/int8") == usual
    tuning.write(table, "NVIDIA H200", "attention_gpu", {"decode": entry | {"sides": 3}})
    with pytest.raises(RequestError, match=r"attention_gpu.*'NVIDIA H200'.*sides"):
        on_device("gpu").trace(*shapes(64, 1, "float32"))
    table.write_text('{"": {"attention_gpu": {"decode": {"rows": -1}}}}')
    tuning.read.cache_clear()
    with pytest.raises(RequestError, match="rows is -1"):
        tuning.sizes("attention_gpu", "", "decode")


MODELS = ["tiny", "arch/gemma2/model.gguf", "stories260K/model.gguf"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_says_the_same_with_kernels_as_with_plain_formulas(
    fixtures: Path, tiny_model: Path, name: str
):
    path = tiny_model if name == "tiny" else fixtures / name
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [[1, *np.random.default_rng(n).integers(3, 250, n).tolist()] for n in (5, 90)]
    said = [
        [out.token_ids for out in LLM(path, kernels=kernels, **SMALL).generate(prompts, params)]
        for kernels in ("pallas", "reference")
    ]
    assert said[0] == said[1]


SMALL: dict[str, Any] = {"dtype": "float32", "weights": "dense", "ctx_size": 128}
SMALL |= {"max_num_seqs": 4, "max_num_batched_tokens": 64}  # two programs


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_compiled_kernels_are_exact_too(name: str):
    case, made = CASES[name], call(CASES[name])
    assert ROUNDING[case.dtype] < 0.01
    for blocks in (None, SPLIT, WHOLE):
        assert_close(run(case, made, blocks, tuning.target()), case, made)
