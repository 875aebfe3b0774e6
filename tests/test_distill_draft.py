"""Drafts: what they are made of, what they learn, and that the whole chain from text to file runs."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import distill_draft
import draft_text
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draft_file import Draft, kept_layers
from draft_text import Answer, Collection
from draft_training import Batch, Distillation, Vocabulary, Words, batches, divergence, train
from tiny import VOCAB, write_model

from realm_jax import LLM, SamplingParams, gguf
from realm_jax.config import EngineConfig
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.ggml import GGMLType
from realm_jax.loading import load_model
from realm_jax.model import Transformer
from realm_jax.nodes import Dense
from realm_jax.scoring import logits

pytestmark = pytest.mark.unoptimized

KEPT = (0, 2)
NORMS = [
    (f"blk.{i}.{kind}_norm.weight", f"blk.{layer}.{kind}_norm.weight")
    for i, layer in enumerate(KEPT)
    for kind in ("attn", "ffn")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("target") / "target.gguf", layers=3)


@pytest.fixture(scope="module")
def target(model: Path) -> LLM:
    return LLM(model, dtype="float32", ctx_size=96, max_num_seqs=4)


@pytest.fixture(scope="module")
def answers(target: LLM) -> list[Answer]:
    """Some that the model gave to questions of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft_text, "ROUND", 8)
        patch.setattr(draft_text, "ASKING", SamplingParams(max_tokens=6))
        return draft_text.collect(target, Collection(tokens=400, sampled=0.3), deadline=math.inf)


def test_an_untrained_draft_is_the_model_without_the_other_layers(model: Path, target: LLM, tmp_path: Path):
    """The same bits; and it has the model's tokens, template and facts."""
    with gguf.open(model) as file:
        Draft(file, KEPT, GGMLType.F32).write(tmp_path / "draft.gguf")
        assert gguf.open(tmp_path / "draft.gguf").metadata.keys() >= file.metadata.keys()
    draft = LLM(tmp_path / "draft.gguf", dtype="float32", ctx_size=96)
    config, params = target.model.config, target.model.params
    fewer = replace(config, num_layers=2, layers=config.layers[:2])
    kept = {**params, **{f"layer_{i}": params[f"layer_{layer}"] for i, layer in enumerate(KEPT)}}
    ids = target.tokenizer.encode("a word and another")
    expected = logits(Transformer(fewer), kept, ids, target.model.numerics)
    np.testing.assert_array_equal(draft.logits(ids), expected)
    assert np.abs(target.logits(ids) - expected).max() > 0.1
    assert [draft.tokenizer.token_text(i) for i in range(VOCAB)] == [
        target.tokenizer.token_text(i) for i in range(VOCAB)
    ]
    talk = [{"role": "user", "content": "Hello"}]
    assert draft.chat_prompt(talk) == target.chat_prompt(talk)


def test_what_is_learned_is_the_models_own_distribution(target: LLM, answers: Sequence[Answer]):
    """Each kept position has the likeliest tokens of the model's logits, and stands before its token."""
    for answer in (answers[0], next(answer for answer in answers if not answer.is_greedy)):
        rows = target.logits(answer.ids.tolist())[answer.start - 1 : -1]
        np.testing.assert_array_equal(answer.top, np.argsort(-rows, axis=-1)[:, : draft_text.TOP])
        weights = np.exp(np.take_along_axis(rows, answer.top, axis=-1))
        np.testing.assert_allclose(answer.share, weights / weights.sum(-1, keepdims=True), atol=1e-4)
        assert (answer.top[:, 0] == answer.ids[answer.start :]).all() == answer.is_greedy

    def rows_of(tokens: np.ndarray, top: np.ndarray, share: np.ndarray) -> list[Any]:
        return list(zip(tokens.tolist(), top.tolist(), share.tolist(), strict=True))

    short = [
        replace(each, ids=each.ids[: each.start + 4], top=each.top[:4], share=each.share[:4])
        for each in answers[:2]
    ]
    learned, lengths = [], set()
    given = [*answers, *short]
    for batch in itertools.islice(batches(given, 1, seed=0), len(given)):
        used = slice(0, int(batch.count))
        learned += rows_of(np.ravel(batch.tokens)[batch.at[used] + 1], batch.top[used], batch.share[used])
        lengths.add(batch.tokens.shape)
    whole = [row for each in given for row in rows_of(each.ids[each.start :], each.top, each.share)]
    assert sorted(learned) == sorted(whole) and len(lengths) == 2


def test_the_divergence_is_that_over_the_whole_vocabulary():
    """With all tokens scored, value and slope are the plain formula's; drawn ones stand for all others."""
    rng = np.random.default_rng(0)
    n, K, D, V = 7, 3, 16, 40
    head = Dense(jnp.asarray(rng.standard_normal((V, D), np.float32)))
    hidden = jnp.asarray(rng.standard_normal((n, D), np.float32))
    top = np.argsort(rng.random((n, V)))[:, :K].astype(np.int32)
    share = rng.dirichlet([1.0] * K, n).astype(np.float32)

    def at(count: int, words: Words) -> tuple[float, np.ndarray]:
        batch = Batch(np.zeros((1, 1), np.int32), np.zeros(n, np.int32), top, share, np.int32(count))
        total, slope = jax.jit(divergence)(head, hidden, batch, words)
        return float(total), np.asarray(slope)

    def plain(hidden: jax.Array) -> jax.Array:
        known = jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.weight.T), jnp.asarray(top), axis=1)
        return (share * (jnp.log(share) - known))[:5].sum()

    none, rest = np.zeros(0, np.int32), np.arange(20, V, dtype=np.int32)
    whole = Words(head.weight, none, np.float32(0))
    value, slope = at(5, whole)
    assert value == pytest.approx(float(plain(hidden)), rel=1e-5) and value > 1
    np.testing.assert_allclose(slope, jax.grad(plain)(hidden), atol=1e-5)
    assert not slope[5:].any()

    halves = [Words(head.weight[:20], half, np.float32(math.log(2))) for half in (rest[::2], rest[1::2])]
    drawn = [math.exp(at(1, words)[0]) for words in halves]
    assert sum(drawn) / 2 == pytest.approx(math.exp(at(1, whole)[0]), rel=1e-5)
    assert abs(drawn[0] - drawn[1]) > 0.01


def test_drawn_words_are_the_rare_ones(target: LLM, answers: Sequence[Answer]):
    mass = np.zeros(VOCAB)
    for answer in answers:
        mass += np.bincount(answer.top.ravel(), answer.share.ravel(), VOCAB)
    vocabulary = Vocabulary(target.model.params, answers, Distillation(frequent=30, rare=40))
    first, words = vocabulary.draw(), vocabulary.draw()
    drawn = set(np.asarray(words.rare).tolist())
    assert len(drawn) == 40 and drawn != set(np.asarray(first.rare).tolist())
    assert mass[list(drawn)].max() < np.sort(mass)[-30] and words.frequent.shape[0] == 30
    best = target.model.params["head"].rows(jnp.asarray([mass.argmax()]))
    np.testing.assert_allclose(words.frequent[0].astype(jnp.float32), best[0], rtol=1e-2)
    assert math.exp(words.weight) == pytest.approx((VOCAB - 30) / 40)


@pytest.mark.parametrize(
    ("foreseen", "length", "expected"),
    [
        ("", 2, 0),
        ("1", 2, 1),
        ("0000", 2, 4),
        ("1101", 2, 2),
        ("111111", 2, 2),
        ("11101111", 4, 2),
        ("11110", 2, 2),
    ],
)
def test_steps_are_those_of_speculation(foreseen: str, length: int, expected: int):
    """A step brings the foreseen tokens, at most as many as were drafted, and the next one."""
    assert distill_draft.steps([hit == "1" for hit in foreseen], length) == expected


def test_from_text_to_file(model: Path, answers: Sequence[Answer], tmp_path: Path):
    """A draft learns what was kept from it, and its file holds that; all of it can be repeated."""
    learned, held_out = distill_draft.split(sorted(answers, key=lambda answer: answer.is_greedy))
    assert sum(answer.count for answer in answers) >= 400 and 1 <= len(held_out) <= len(answers) // 4
    prompts = [tuple(answer.ids[: answer.start].tolist()) for answer in answers]
    assert len(set(prompts)) == len(prompts) and all(answer.is_greedy for answer in held_out)
    assert {id(answer) for answer in learned}.isdisjoint(map(id, held_out))

    initial, output = tmp_path / "initial.gguf", tmp_path / "draft.gguf"
    config = Distillation(epochs=40, batch_size=4, warmup=2, lr=3e-3)
    with gguf.open(model) as file:
        draft = Draft(file, KEPT, GGMLType.Q4_0)
        draft.write(initial)
        done = distill_draft.distilled(draft, initial, output, learned, config, seconds=1e6)
    first, last = (np.mean(part) for part in (done.losses[:3], done.losses[-3:]))
    assert last < 0.5 * first, (first, last)
    start = load_model(initial, EngineConfig(ctx_size=96, dtype="float32"))
    assert train(start, learned, replace(config, epochs=1), 1e6).losses[0] == done.losses[0]
    assert not train(start, learned, config, seconds=1e-9).losses

    after = distill_draft.measure(output, learned[:4])
    assert after["agreement"] > 0.3 and after["loss"] < 4, after
    assert 1 < after["tokens_a_step"][2] <= after["tokens_a_step"][4] <= 5
    with gguf.open(output) as file, gguf.open(model) as source:
        assert file.metadata["llama.block_count"] == 2 and "draft" in file.metadata["general.name"]
        kinds = {name: info.ggml_type for name, info in file.tensors.items() if len(info.shape) == 2}
        assert set(kinds.values()) == {GGMLType.Q4_0} and "blk.1.ffn_down.weight" in kinds
        for name, origin in (("output_norm.weight", "output_norm.weight"), *NORMS):
            assert file.data(name).tobytes() != source.data(origin).tobytes()
        assert file.metadata["tokenizer.ggml.tokens"] == source.metadata["tokenizer.ggml.tokens"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["-o", "no/such/draft.gguf"], "no/such is no folder"),
        (["-o", "a.gguf", "--minutes", "nan"], "minutes is nan; it must be at least 0.1"),
        (["-o", "a.gguf", "--layers", "4", "-m", "MODEL"], "layers is 4; the model has 3"),
    ],
)
def test_wrong_options_are_refused_before_any_work(model: Path, given: list[str], message: str):
    options = distill_draft.parsed([str(model) if each == "MODEL" else each for each in given])
    with pytest.raises(RequestError, match=message):
        distill_draft.run(options)


@pytest.mark.parametrize(
    ("name", "message"), [("gemma2", "layers differ"), ("llama-moe", "experts"), ("qwen2", "biases")]
)
def test_other_kinds_of_models_are_refused(fixtures: Path, name: str, message: str):
    with (
        gguf.open(fixtures / "arch" / name / "model.gguf") as file,
        pytest.raises(UnsupportedError, match=message),
    ):
        Draft(file, (0,), GGMLType.F32)


def test_the_first_layer_and_the_last_ones_are_kept():
    assert [kept_layers(5, count) for count in (1, 2, 3)] == [(0,), (0, 4), (0, 3, 4)]
    assert kept_layers(3, 3) == (0, 1, 2)
