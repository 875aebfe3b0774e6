"""Experts that the C++ kernels multiply together are those same experts one by one."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_cases import normal, random_blocks, require_native
from test_batching import bits
from test_engine import mixed_requests, random_prompt
from test_experts import D, E, F, choices, dense, mix
from test_words import QUICK

from realm_jax import LLM
from realm_jax.experts import EachExpert, GroupedExperts, joined
from realm_jax.ggml import GGMLType
from realm_jax.kernels.tiles import dequantize_tiles
from realm_jax.native_nodes import NativeDense, NativeQuantized
from realm_jax.nodes import Biased, Kernel, Stacked
from realm_jax.quant.containers import pack
from realm_jax.quant.tiling import tile

require_native()


def packed(rng: np.random.Generator, outputs: int, inputs: int) -> NativeQuantized:
    """A matrix in four bits, as the C++ kernels take it."""
    data = random_blocks(rng, GGMLType.Q4_1, (outputs, inputs))
    stored = pack(data, GGMLType.Q4_1, (outputs, inputs))
    assert stored is not None
    array, form = tile(stored)
    return NativeQuantized(jnp.asarray(array), form=form, outputs=outputs)


def weights(node: NativeQuantized | NativeDense) -> np.ndarray:
    """The numbers [O, I]."""
    if isinstance(node, NativeDense):
        return np.asarray(node.weight, np.float64)
    return np.asarray(dequantize_tiles(node.tiles, node.form), np.float64)[: node.outputs]


def half_precise(rng: np.random.Generator, outputs: int, inputs: int) -> NativeDense:
    return NativeDense(dense(rng, outputs, inputs).weight.astype(jnp.bfloat16))


def parted(rng: np.random.Generator, outputs: int, inputs: int) -> Biased:
    both = Stacked((packed(rng, outputs // 2, inputs), half_precise(rng, outputs // 2, inputs)))
    return Biased(both, jnp.asarray(normal(rng, outputs)))


@pytest.mark.parametrize("make", [packed, half_precise, parted])
@pytest.mark.parametrize("lead", [(1, 1), (5, 1), (3, 40)])
def test_the_kernels_multiply_rows_by_their_own_experts(make: Callable[..., Kernel], lead: tuple[int, ...]):
    """Bit for bit what each expert gives alone, and the same gradient."""
    rng = np.random.default_rng(5)
    gate_up, down = [make(rng, 2 * F, D) for _ in range(E)], [make(rng, D, F) for _ in range(E)]
    x, (chosen, share) = jnp.asarray(normal(rng, *lead, D)), choices(rng, *lead)
    nodes = [joined(gate_up, down, stacked=kinds, tile=1) for kinds in ((NativeQuantized, NativeDense), ())]
    assert [type(node) for node in nodes] == [GroupedExperts, EachExpert]
    found, wanted = (np.asarray(mix(node, x, chosen, share)) for node in nodes)
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("make", [packed, half_precise])
def test_gradients_pass_through_the_experts_of_the_kernels(make: Callable[..., Any]):
    rng = np.random.default_rng(6)
    each = [make(rng, 40, D) for _ in range(3)]
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
    expert, x = [2, 2, 0, -1], jnp.asarray(normal(rng, 4, 1, D))
    pull = jnp.asarray(normal(rng, 4, 1, 40))

    @partial(jax.jit, compiler_options=QUICK)
    def pulled(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y, back = jax.vjp(lambda x: stacked.grouped(x, jnp.asarray(expert, jnp.int32)), x)
        return y, back(pull)[0]

    found, gradient = map(np.asarray, pulled(x))
    for t, e in enumerate(expert):
        y = np.zeros((1, 40)) if e < 0 else x[t] @ each[e]
        back = np.zeros((1, D)) if e < 0 else np.asarray(pull[t], np.float64) @ weights(each[e])
        np.testing.assert_array_equal(found[t], y)
        np.testing.assert_allclose(gradient[t], back, rtol=0, atol=2e-6 * max(np.abs(back).max(), 1))


def test_a_model_of_experts_batched_is_alone(fixtures: Path):
    rng = random.Random(0)
    llm = LLM(
        fixtures / "arch" / "qwen3moe" / "model.gguf", max_num_seqs=4, max_num_batched_tokens=64, ctx_size=256
    )
    assert isinstance(llm.model.params["layer_0"]["mlp"]["experts"], GroupedExperts)
    _, params = mixed_requests(1, 5)
    prompts = [random_prompt(rng, length) for length in (1, 9, 64, 65, 150)]
    together = llm.generate(prompts, params)
    alone = [llm.generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    assert [bits(each) for each in together] == [bits(each) for each in alone]


@pytest.mark.parametrize("expert", [[0, 3], [0, -2]])
def test_an_expert_that_is_not_there_raises(expert: list[int]):
    rng = np.random.default_rng(7)
    for make in (packed, half_precise):
        each: list[Any] = [make(rng, 16, D) for _ in range(3)]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
        with pytest.raises(jax.errors.JaxRuntimeError, match="there is no such expert"):
            jax.block_until_ready(stacked.grouped(jnp.zeros((2, 1, D)), jnp.asarray(expert, jnp.int32)))
