"""Activations and edits: what is seen is what the model computes, and an edit does what it says."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import count_compilations
from gguf import GGMLQuantizationType as Kind
from jax.tree_util import Partial
from tiny import write_model

from realm_jax import LLM, research, runtime
from realm_jax.config import EngineConfig
from realm_jax.errors import RequestError
from realm_jax.kernels import native
from realm_jax.loading import LoadedModel, load_model
from realm_jax.research import AtPositions, Forward
from realm_jax.training.targets import adapted, chosen_parts, deltas, initial_factors

KINDS = {"attn_q": Kind.Q4_0, "attn_v": Kind.Q8_0, "attn_output": Kind.Q4_1, "ffn_down": Kind.Q4_0}
T = 12
A, B = np.random.default_rng(0).integers(3, 300, (2, 1, T)).astype(np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("research") / "mixed.gguf", kinds=KINDS, seed=3)


def loaded(path: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(**options)
    runtime.configure(config)
    return load_model(path, config)


@pytest.fixture(scope="module")
def model(path: Path) -> LoadedModel:
    return loaded(path, dtype="float32", weights="dense")


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(path, dtype="float32", ctx_size=64)


def forward(model: LoadedModel, tokens: Any, **how: Any) -> Forward:
    return jax.jit(lambda p, t: research.forward(model.transformer, p, t, **how))(model.params, tokens)


@pytest.fixture(scope="module")
def seen(model: LoadedModel) -> tuple[Forward, Forward]:
    """All of two runs."""
    return forward(model, A, capture=["*"]), forward(model, B, capture=["*"])


def changed(params: Any, path: str, weight: Any) -> Any:
    """The params with a dense matrix as `weight` makes it."""
    first, _, rest = path.partition("/")
    if rest:
        return {**params, first: changed(params[first], rest, weight)}
    return {**params, first: params[first].replace(weight=weight(params[first].weight))}


def test_capture_and_identity_change_no_logits(llm: LLM, model: LoadedModel, seen: tuple[Forward, Forward]):
    plain = forward(model, A).logits
    np.testing.assert_allclose(seen[0].logits, plain, atol=1e-6)
    np.testing.assert_allclose(forward(model, A, edit={"*": lambda x: x * 1}).logits, plain, atol=1e-6)
    np.testing.assert_allclose(plain[0], llm.logits(A[0].tolist()), atol=1e-5)


def test_what_stands_at_one_name_decides_all_that_follows(model: LoadedModel, seen: tuple[Forward, Forward]):
    """Any one of these patched from run A into run B gives A; so does everything at once."""
    a, b = seen
    whole = ["embedding", "layers.0.resid_mid", "layers.0.resid_post", "layers.1.resid_pre", "norm"]

    @jax.jit
    def patched(params: Any, activations: Any) -> list[jax.Array]:
        def put(*names: str) -> jax.Array:
            edit = {name: lambda _, name=name: activations[name] for name in names}
            return research.forward(model.transformer, params, B, edit=edit).logits

        return [*(put(name) for name in whole), put(*activations), put("layers.1.attention.q")]

    *same, partly = patched(model.params, a.activations)
    for name, logits in zip([*whole, "all"], same, strict=True):
        np.testing.assert_allclose(logits, a.logits, atol=1e-5, err_msg=name)
    assert np.abs(partly - a.logits).max() > 0.1
    assert np.abs(partly - b.logits).max() > 0.1


def test_zero_in_an_activation_is_zero_in_the_weight_that_reads_it(model: LoadedModel):
    """A head, hidden features, a layer's halves: each against the model whose matrix lacks it."""
    H = model.config.head_dim
    cases = [
        ("layers.0.attention.heads", lambda x: x.at[:, :, 1].set(0), "layer_0/attention/out/kernel",
         lambda w: w.at[:, H : 2 * H].set(0)),
        ("layers.1.mlp.hidden", lambda x: x.at[..., 5:9].set(0), "layer_1/mlp/down/kernel",
         lambda w: w.at[:, 5:9].set(0)),
        ("layers.1.mlp", jnp.zeros_like, "layer_1/mlp/down/kernel", jnp.zeros_like),
        ("layers.0.attention", jnp.zeros_like, "layer_0/attention/out/kernel", jnp.zeros_like),
    ]  # fmt: skip

    @jax.jit
    def both(params: Any) -> list[tuple[jax.Array, jax.Array]]:
        return [
            (
                research.forward(model.transformer, params, A, edit={name: edit}).logits,
                research.forward(model.transformer, changed(params, at, weight), A).logits,
            )
            for name, edit, at, weight in cases
        ]

    plain = forward(model, A).logits
    for (name, *_), (edited, wanted) in zip(cases, both(model.params), strict=True):
        np.testing.assert_allclose(edited, wanted, atol=1e-5, err_msg=name)
        assert np.abs(edited - plain).max() > 1e-2


def test_gradients_are_differences(model: LoadedModel):
    """With respect to what an edit adds to embeddings and activations, and to an adapter's factors."""
    rng = np.random.default_rng(1)
    names = ["embedding", "layers.0.resid_mid", "layers.1.attention.heads", "layers.1.attention.weights"]
    shapes = research.names(model.transformer, model.params, tokens=T)
    zeros = {name: jnp.zeros(shapes[name]) for name in names}
    factors = initial_factors(chosen_parts(model.config, ["q", "down"]), 2, seed=1)
    factors = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)), factors)

    @jax.jit
    def loss(variables: Any) -> jax.Array:
        added, factors = variables
        params = adapted(model.params, model.config, deltas(factors, 1.0))
        edit = {name: lambda x, name=name: x + added[name] for name in names}
        found = research.forward(model.transformer, params, A, edit=edit)
        return -research.token_logprobs(found.logits, found.tokens).mean()

    at = (zeros, factors)
    gradient = jax.jit(jax.grad(loss))(at)
    for which, name in [*((0, name) for name in names), (1, next(iter(factors)))]:
        only = jax.tree.map(jnp.zeros_like, gradient)
        only[which][name] = gradient[which][name]
        norm = np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(only)]))
        assert norm > 1e-4
        moves = [jax.tree.map(lambda g, by=by / norm: by * g, only) for by in (1e-2, -1e-2)]
        up, down = (loss(jax.tree.map(jnp.add, at, move)) for move in moves)
        np.testing.assert_allclose((up - down) / 2e-2, norm, rtol=2e-2, err_msg=name)


def test_vmap_is_one_at_a_time(model: LoadedModel):
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(64, np.float32))

    def steered(scale: jax.Array) -> jax.Array:
        edit = {"layers.0.resid_post": lambda x: x + scale * direction[None, None]}
        return research.forward(model.transformer, model.params, A, edit=edit).logits

    scales = jnp.array([0.0, 1.0, -3.0])
    found = jax.jit(jax.vmap(steered))(scales)
    one = jax.jit(steered)
    np.testing.assert_allclose(found, jnp.stack([one(s) for s in scales]), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": "float32", "weights": "quantized"}, 1e-4),
        ({"dtype": "bfloat16", "weights": "quantized", "kernels": "native"}, 0.1),
    ],
)
def test_quantized_weights_give_what_dense_ones_do(
    path: Path, seen: tuple[Forward, Forward], options: dict[str, Any], error: float
):
    if options.get("kernels") == "native" and (problem := native.problem()):
        pytest.skip(problem)
    found = forward(loaded(path, **options), A, capture=["*"])
    assert found.activations.keys() == seen[0].activations.keys()
    for name, x in seen[0].activations.items():
        assert np.linalg.norm(found[name] - x) <= error * np.linalg.norm(x), name


def test_the_lens_at_the_last_layer_is_the_model(llm: LLM, model: LoadedModel):
    found = research.run(llm, [A[0].tolist(), B[0, :7].tolist()], capture=["layers.*.resid_post"])
    lens = research.logit_lens(llm, found, best=3)
    assert lens.ids.shape == (2, 2, T, 3)
    scores = jax.nn.log_softmax(found.logits, axis=-1)
    np.testing.assert_allclose(lens.logprobs[-1], jax.lax.top_k(scores, 3)[0], atol=1e-5)
    np.testing.assert_array_equal(lens.ids[-1, ..., 0], found.logits.argmax(-1))
    np.testing.assert_allclose(lens.entropy[-1], -(jnp.exp(scores) * scores).sum(-1), atol=1e-4)
    np.testing.assert_allclose(
        lens.of_next[-1], research.token_logprobs(found.logits, found.tokens), atol=1e-5
    )
    assert np.abs(lens.logprobs[0] - lens.logprobs[1]).max() > 0.1
    served = jax.nn.log_softmax(llm.logits(A[0].tolist()), axis=-1)
    np.testing.assert_allclose(lens.of_next[-1, 0], served[np.arange(T - 1), A[0, 1:]], atol=1e-4)
    # a shorter prompt beside a longer one is as it is alone
    alone = forward(model, B[:, :7], capture=["layers.*.resid_post"])
    np.testing.assert_allclose(found.logits[1, :7], alone.logits[0], atol=1e-5)
    np.testing.assert_allclose(
        found.last("layers.1.resid_post")[1], alone["layers.1.resid_post"][0, -1], atol=1e-5
    )


def test_arrays_of_a_partial_compile_nothing_new(llm: LLM, model: LoadedModel):
    def add(vector: jax.Array, x: jax.Array) -> jax.Array:
        return x + vector[None, None]

    def at_third(vector: jax.Array, x: jax.Array, positions: jax.Array) -> jax.Array:
        return jnp.where((positions == 2)[..., None], x + vector[None, None], x)

    def logits(scale: float) -> jax.Array:
        vector = jnp.full(64, scale)
        edit = {
            "layers.0.resid_post": Partial(add, vector),
            "embedding": AtPositions(Partial(at_third, vector)),
        }
        return research.run(llm, A[0].tolist(), edit=edit).logits

    plain = logits(0.0)
    with count_compilations() as compiled:
        steered = logits(0.5)
    assert not compiled
    assert np.abs(steered - plain).max() > 0.1
    np.testing.assert_allclose(plain, forward(model, A).logits, atol=1e-6)


def test_pictures_are_drawn(llm: LLM, seen: tuple[Forward, Forward], tmp_path: Path):
    """Each another one; what cannot be drawn is said."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    research.plot_attention(llm, seen[0], 0, paths[0])
    research.plot_attention(llm, seen[0], 1, paths[1], heads=[3])
    research.plot_logprobs(llm, seen[0], paths[2])
    assert len({path.read_bytes() for path in paths}) == 3
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(RequestError, match=r"heads is \[4\]; give some of 0 to 3"):
        research.plot_attention(llm, seen[0], 0, paths[0], heads=[4])
    with pytest.raises(RequestError, match="was not captured; give capture"):
        research.plot_attention(llm, seen[0], 2, paths[0])
    with pytest.raises(RequestError, match="must end with"):
        research.plot_logprobs(llm, seen[0], tmp_path / "plot.gif")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            {"capture": ["layers.7.resid_post"]},
            "'layers.7.resid_post' names no activation of this model; near",
        ),
        ({"edit": {"layers.0.residual": jnp.sin}}, "near are layers.*.resid"),
        ({"capture": ["nothing"]}, "there are embedding, layers.*.resid_pre"),
        ({"capture": "norm"}, "give a list of names"),
        ({"edit": {"norm": 3}}, "give a function"),
        (
            {"edit": {"norm": lambda x: x[:, 1:]}},
            r"gives float32 \[1, 11, 64\]; the activation is float32 \[1, 12",
        ),
        ({"edit": {"norm": lambda x: None}}, "gives NoneType"),
    ],
)
def test_a_wrong_name_or_edit_says_what_is_there(model: LoadedModel, how: dict[str, Any], said: str):
    with pytest.raises(RequestError, match=said):
        research.forward(model.transformer, model.params, jnp.asarray(A), **how)
