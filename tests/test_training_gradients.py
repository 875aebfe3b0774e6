"""What training computes: the loss is serving's, gradients are those of dense float32 weights."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tiny import write_model

from realm_jax import LLM, runtime
from realm_jax.config import EngineConfig
from realm_jax.kernels import native, reference
from realm_jax.kernels.tiles import tiles_matmul
from realm_jax.layers import Block
from realm_jax.loading import LoadedModel, load_model
from realm_jax.lora.nodes import Adapted, Delta
from realm_jax.model import Transformer
from realm_jax.nodes import Dense, Quantized
from realm_jax.sequence_cache import SequenceCache
from realm_jax.training.blocks import CheckpointedBlock
from realm_jax.training.loss import summed_loss
from realm_jax.training.settings import TrainingConfig
from realm_jax.training.step import Step
from realm_jax.training.targets import DroppedDelta, adapted, chosen_parts, deltas, initial_factors

KINDS = {
    "attn_q": Kind.Q4_0,
    "attn_k": Kind.Q4_0,
    "attn_v": Kind.Q8_0,  # stacked with the others in one projection
    "attn_output": Kind.Q4_1,
    "ffn_gate": Kind.Q4_0,
    "ffn_up": Kind.Q4_0,
    "ffn_down": Kind.BF16,
    "output": Kind.Q8_0,
}
B, T = 3, 24


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(
        tmp_path_factory.mktemp("mixed") / "mixed.gguf", layers=1, ffn=160, kinds=KINDS, seed=5
    )


def loaded(path: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(**options)
    runtime.configure(config)
    return load_model(path, config)


def factors_of(model: LoadedModel, rank: int = 3) -> dict[str, dict[str, jax.Array]]:
    """Random factors, b too: from zeros, a would get no gradient."""
    factors = initial_factors(chosen_parts(model.config, ["all"]), rank, seed=1)
    rng = np.random.default_rng(2)
    for each in factors.values():
        each["b"] = jnp.asarray(0.1 * rng.standard_normal(each["b"].shape, np.float32))
    return factors


def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(3)
    is_target = rng.random((B, T)) < 0.4
    is_target[:, 0] = False
    return jnp.asarray(rng.integers(3, 300, (B, T)), jnp.int32), jnp.asarray(is_target)


def gradients(model: LoadedModel, block: type[Block] = Block) -> tuple[jax.Array, Any]:
    transformer = Transformer(model.config, block)

    def loss(factors: Any, params: Any) -> jax.Array:
        return summed_loss(transformer, adapted(params, model.config, deltas(factors, 1.5)), *batch())

    return jax.jit(jax.value_and_grad(loss))(factors_of(model), model.params)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def plain(path: Path) -> tuple[LoadedModel, jax.Array, Any]:
    """Of dense float32 weights."""
    model = loaded(path, dtype="float32", weights="dense")
    return model, *gradients(model)


def test_the_loss_is_minus_the_log_probability_that_serving_gives(path: Path):
    tokens, is_target = batch()
    llm = LLM(path, dtype="float32", ctx_size=64)
    found = jax.jit(summed_loss, static_argnums=0)(llm.transformer, llm.model.params, tokens, is_target)
    scores = llm.score([row.tolist() for row in np.asarray(tokens)])
    wanted = -sum(
        p
        for score, row in zip(scores, is_target, strict=True)
        for p, is_wanted in zip(score.logprobs[1:], row[1:], strict=True)
        if p is not None and is_wanted
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_gradients_are_the_losses_differences(plain: tuple[LoadedModel, jax.Array, Any]):
    """Along the gradient itself, and along a random direction."""
    model, _, found = plain
    factors, rng = factors_of(model), np.random.default_rng(4)
    transformer = Transformer(model.config)

    @jax.jit
    def loss(factors: Any) -> jax.Array:
        return summed_loss(transformer, adapted(model.params, model.config, deltas(factors, 1.5)), *batch())

    random = jax.tree.map(lambda g: jnp.asarray(rng.standard_normal(g.shape, np.float32)), found)
    for direction in (found, random):
        norm = float(np.linalg.norm(flat(direction)))
        step = 2e-2 if direction is random else 2e-3
        moves = (jax.tree.map(lambda d, by=by: by * d, direction) for by in (step / norm, -step / norm))
        ends = [loss(jax.tree.map(jnp.add, factors, move)) for move in moves]
        wanted = float(flat(found) @ flat(direction)) / norm
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), wanted, rtol=2e-2)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float32", "weights": "quantized"}, 1e-4),
        ({"dtype": "bfloat16", "weights": "dense", "kernels": "xla"}, 0.03),
        ({"dtype": "bfloat16", "weights": "quantized", "kernels": "native"}, 0.06),
        ({"dtype": "bfloat16", "weights": "dense", "kernels": "native"}, 0.03),
    ],
)
def test_gradients_of_every_base_are_those_of_the_dense_one(
    path: Path, plain: tuple[LoadedModel, jax.Array, Any], options: dict[str, Any], error: float
):
    if options.get("kernels") == "native" and (problem := native.problem()):
        pytest.skip(problem)
    (_, loss, wanted), (value, found) = plain, gradients(loaded(path, **options))
    np.testing.assert_allclose(value, loss, rtol=error)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, wanted)
    assert np.linalg.norm(flat(found) - flat(wanted)) < error * np.linalg.norm(flat(wanted))


def test_blocks_that_are_computed_anew_give_the_same(plain: tuple[LoadedModel, jax.Array, Any]):
    model, loss, wanted = plain
    value, found = gradients(model, CheckpointedBlock)
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    np.testing.assert_allclose(flat(found), flat(wanted), rtol=1e-3, atol=1e-4)


def test_batches_of_a_step_add_up(plain: tuple[LoadedModel, jax.Array, Any]):
    """Gradients of two halves, one after the other, are those of the whole; dropout is another each time."""
    model, loss, wanted = plain
    factors, (tokens, is_target) = factors_of(model), batch()
    step = Step(Transformer(model.config), TrainingConfig(rank=2, alpha=3.0), 10)
    total, losses = jax.tree.map(jnp.zeros_like, factors), []
    for rows in ([0, 1, 1], [2, 2, 2]):
        once = np.array([[rows.index(r) == i] for i, r in enumerate(rows)])
        arrays = (tokens[np.array(rows)], is_target[np.array(rows)] & once)
        total, value = step.accumulate(model.params, factors, total, *arrays, np.int32(0))
        losses.append(value)
    np.testing.assert_allclose(sum(losses), loss, rtol=1e-5)
    np.testing.assert_allclose(flat(total), flat(wanted), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0), (7, 2.0)])
def test_attention_of_a_sequence_is_that_of_the_cache(window: int | None, softcap: float | None):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 19, n, 8), np.float32)) for n in (6, 2, 2))
    positions = jnp.broadcast_to(jnp.arange(19, dtype=jnp.int32), (2, 19))
    how: dict[str, Any] = {"scale": 0.4, "softcap": softcap, "window": window}
    found = SequenceCache.empty(2).write(k, v, None, positions).attend(q, None, positions, **how)
    wanted = reference.attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), positions, **how)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_an_adapted_matrix_is_the_changed_matrix():
    """A part without a change is as it was; products and rows of an embedding alike."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    weight, a, b, x = normal(10, 6), normal(2, 6), normal(4, 2), normal(2, 3, 6)
    changed = weight.copy()
    changed[3:7] += 0.5 * (b @ a)
    delta = Delta(jnp.asarray(a), jnp.asarray(b), jnp.float32(0.5))
    node = Adapted(Dense(jnp.asarray(weight)), (None, delta, None), (3, 4, 3))
    assert node.shape == (6, 10)
    np.testing.assert_allclose(jnp.asarray(x) @ node, x @ changed.T, atol=1e-5)
    table = Adapted(Dense(jnp.asarray(weight[3:7])), (delta,), (4,))
    ids = jnp.asarray([[0, 3], [3, 1]], jnp.int32)
    np.testing.assert_allclose(table.rows(ids), changed[3:7][np.asarray(ids)], atol=1e-5)


def test_dropout_keeps_the_mean_and_depends_on_the_key():
    delta = Delta(jnp.ones((1, 64)), jnp.ones((1, 1)), jnp.float32(1))
    keys = jax.random.split(jax.random.key(0), 500)
    found = jax.vmap(lambda key: DroppedDelta(delta, key, 0.25).of(jnp.ones((1, 64))))(keys).reshape(-1)
    assert len(np.unique(found)) > 10
    np.testing.assert_allclose(found.mean(), 64, rtol=0.01)  # deviation of the mean: 0.2


def test_the_backward_pass_keeps_codes_rather_than_weights(path: Path):
    node = loaded(path, dtype="float32", weights="quantized").params["layer_0"]["attention"]["out"]["kernel"]
    assert isinstance(node, Quantized)
    kept = jax.vjp(lambda x: tiles_matmul(x, node.tiles, node.form, node.outputs), jnp.ones((4, 64)))[1]
    assert sum(x.nbytes for x in jax.tree.leaves(kept)) <= node.tiles.nbytes < 4 * 64 * 64
