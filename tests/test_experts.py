"""Experts in stacked arrays are those same experts one by one, and rows do not notice each other."""

from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from native_cases import normal
from test_pallas_matmul import DEVICES, abstract_words, by_platform, moderate_words
from test_words import QUICK

from realm_jax.experts import EachExpert, Experts, Groupable, GroupedExperts, joined, places, tile_rows
from realm_jax.ggml import GGMLType
from realm_jax.kernels.pallas.matmul import grouped_matmul
from realm_jax.kernels.pallas.tuning import Target
from realm_jax.kernels.words import dequantize_words
from realm_jax.nodes import Dense, Int8, Kernel, Stacked, Words

E, D, F, USED = 5, 64, 96, 2


def half(hidden: jax.Array) -> jax.Array:
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def dense(rng: np.random.Generator, outputs: int, inputs: int) -> Dense:
    return Dense(jnp.asarray(normal(rng, outputs, inputs) / inputs**0.5))


def quantized(rng: np.random.Generator, outputs: int, inputs: int) -> Words:
    array, form, _ = moderate_words(rng, GGMLType.Q8_0, (outputs, inputs))
    return Words(array, form=form, dtype="float32")


def mixed(rng: np.random.Generator, outputs: int, inputs: int) -> Stacked:
    """Parts that are stored apart, as where gate and up have different types."""
    return Stacked((quantized(rng, outputs // 2, inputs), dense(rng, outputs // 2, inputs)))


Make = Callable[[np.random.Generator, int, int], Dense | Words | Stacked]


def expanded(node: Kernel) -> Dense:
    """The same matrix in float32."""
    match node:
        case Words():
            return Dense(dequantize_words(node.words, node.form).T)
        case Stacked():
            return Dense(jnp.concatenate([expanded(part).weight for part in node.parts]))
    assert isinstance(node, Dense)
    return node


@cache
def experts(make: Make) -> tuple[GroupedExperts, EachExpert]:
    """Stacked, and the same one by one as plain matrices."""
    rng = np.random.default_rng(0)
    gate_up = [make(rng, 2 * F, D) for _ in range(E)]
    down = [make(rng, D, F) for _ in range(E)]
    stacked = joined(gate_up, down, stacked=Groupable)
    plain = joined(list(map(expanded, gate_up)), list(map(expanded, down)), stacked=())
    assert isinstance(stacked, GroupedExperts) and isinstance(plain, EachExpert)
    assert stacked.shape == plain.shape == (E, D, F)
    return stacked, plain


def choices(rng: np.random.Generator, *lead: int) -> tuple[jax.Array, jax.Array]:
    """Of each row, different experts and their shares; expert 3 is never chosen."""
    known = np.array([0, 1, 2, 4])
    chosen = np.stack([rng.permutation(known)[:USED] for _ in range(int(np.prod(lead)))])
    share = rng.uniform(0.1, 1, chosen.shape).astype(np.float32)
    return jnp.asarray(chosen.reshape(*lead, USED), jnp.int32), jnp.asarray(share.reshape(*lead, USED))


def mixed_outputs(node: Experts, x: jax.Array, chosen: jax.Array, share: jax.Array) -> jax.Array:
    return node.mix(x, chosen, share, half)


mix = jax.jit(mixed_outputs, compiler_options=QUICK)


@pytest.mark.parametrize(
    ("make", "lead"), [(dense, (4, 1)), (dense, (3, 64)), (quantized, (4, 1)), (mixed, (3, 64))]
)
def test_stacked_experts_are_the_same_experts(make: Make, lead: tuple[int, ...]):
    rng = np.random.default_rng(sum(lead))
    x, (chosen, share) = jnp.asarray(normal(rng, *lead, D)), choices(rng, *lead)
    found, wanted = (mix(node, x, chosen, share) for node in experts(make))
    assert found.shape == x.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("make", [dense, quantized])
def test_a_row_does_not_notice_the_others(make: Make):
    """Whatever they are and choose, and though an expert that they chose overflows."""
    rng, node = np.random.default_rng(1), experts(make)[0]
    x, (chosen, share) = normal(rng, 16, 1, D), choices(rng, 16, 1)
    chosen = chosen.at[5].set(jnp.asarray([[0, 1]], jnp.int32))
    alone = np.asarray(mix(node, jnp.asarray(x), chosen, share))[5]
    others = np.full_like(x, 3e38)
    others[5] = x[5]
    elsewhere = jnp.full_like(chosen, 4).at[:, :, 1].set(2).at[5].set(chosen[5])
    found = np.asarray(mix(node, jnp.asarray(others), elsewhere, share))
    assert found[5].tobytes() == alone.tobytes() and not np.isfinite(found[4]).all()


@pytest.mark.parametrize("make", [dense, quantized])
def test_the_gradient_is_that_of_each_expert(make: Make):
    rng = np.random.default_rng(2)
    x, (chosen, share) = jnp.asarray(normal(rng, 4, 1, D)), choices(rng, 4, 1)
    pull = jnp.asarray(normal(rng, 4, 1, D))

    @partial(jax.jit, compiler_options=QUICK)
    def gradient(node: Experts) -> jax.Array:
        return jax.grad(lambda x: (mixed_outputs(node, x, chosen, share) * pull).sum())(x)

    found, wanted = map(gradient, experts(make))
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5 * float(jnp.abs(wanted).max()))


def test_every_pair_has_a_place_of_its_own_in_a_tile_of_its_expert():
    for n, count, tile in ((1, 8, 16), (40, 8, 16), (300, 3, 128), (64, 64, 16), (40, 8, 1)):
        assert tile in (1, tile_rows(n, count))
        chosen = np.random.default_rng(n).integers(0, count, n).astype(np.int32)
        chosen[n // 2 :] = chosen[0]  # most go to one
        place, expert = map(np.asarray, jax.jit(places, static_argnums=(1, 2))(chosen, count, tile))
        assert len(set(place.tolist())) == n and (expert[place // tile] == chosen).all()
        used = (expert >= 0).sum()
        assert (np.diff(expert[:used]) >= 0).all() and (expert[used:] == -1).all()
        assert used == sum(-(-(chosen == e).sum() // tile) for e in range(count))


def test_what_cannot_be_stacked_stays_apart():
    rng = np.random.default_rng(0)
    odd = Int8((jnp.zeros((2, 2), jnp.int8),), jnp.zeros((1, 2)))
    assert isinstance(joined([dense(rng, 2, 2)], [odd], stacked=Groupable), EachExpert)
    assert isinstance(joined([Stacked((odd,))], [dense(rng, 2, 2)], stacked=Groupable), EachExpert)


@by_platform
def test_the_grouped_kernel_reads_the_expert_of_a_tile(where: Target):
    rng = np.random.default_rng(4)
    each = [moderate_words(rng, GGMLType.Q4_1, (99, 256)) for _ in range(3)]
    stacked, form = jnp.stack([array for array, _, _ in each]), each[0][1]
    expert, x = [2, 0, 2, -1], normal(rng, 4, 16, 256)

    @partial(jax.jit, compiler_options=QUICK)
    def multiply(x: jax.Array, stacked: jax.Array, expert: jax.Array) -> jax.Array:
        return grouped_matmul(x, stacked, expert, form, where)

    found = multiply(jnp.asarray(x), stacked, jnp.asarray(expert, jnp.int32))
    for tile, e in enumerate(expert):
        weight = np.zeros((99, 256)) if e < 0 else each[e][2].astype(np.float64)
        bound = 2e-6 * (np.abs(x[tile]) @ np.abs(weight).T)
        assert (np.abs(np.asarray(found[tile]) - x[tile] @ weight.T) <= bound).all()


@pytest.mark.parametrize("where", DEVICES, ids=lambda where: where.platform)
def test_the_grouped_kernel_lowers_for_devices_that_are_not_here(where: Target):
    array, form = abstract_words(GGMLType.Q4_K, 4096, 28672)
    program = jax.jit(lambda x, words, expert: grouped_matmul(x, words, expert, form, where))
    shapes = (
        jax.ShapeDtypeStruct((8, 16, 4096), jnp.bfloat16),
        jax.ShapeDtypeStruct((8, *array.shape), jnp.int32),
        jax.ShapeDtypeStruct((8,), jnp.int32),
    )
    if where.platform == "gpu":
        text = program.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert "__gpu$xla.gpu.triton" in text
    else:
        assert "tpu_custom_call" in jax.export.export(program, platforms=("tpu",))(*shapes).mlir_module()
