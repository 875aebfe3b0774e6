"""Variants of an LLM: what decodes with edits is what whole sequences with them say, greedy or sampled."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import count_compilations
from tiny import VOCAB, write_model

from realm_jax import LLM, SamplingParams, research
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.research import AtPositions, Written

PROMPTS = [[1, 5, 7, 9], [1, 8, 200, 3, 44], [1, 20]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.3, seed=7, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = write_model(tmp_path_factory.mktemp("variants") / "tiny.gguf", seed=1)
    return LLM(path, dtype="float32", ctx_size=64, max_num_seqs=4, max_num_batched_tokens=64)


def tokens_of(llm: LLM, params: SamplingParams) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(PROMPTS, params)]


def greedy(llm: LLM, prompt: list[int], edit: dict[str, Any]) -> list[int]:
    """By whole sequences of one length, each longer by a token."""
    ids = list(prompt)
    for _ in range(GREEDY.max_tokens or 0):
        ids.append(int(research.run(llm, filled(ids), edit=edit).logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


def test_edits_while_decoding_are_those_of_whole_sequences(llm: LLM):
    direction = np.random.default_rng(0).standard_normal((1, 1, 64), np.float32)
    edit = {
        "layers.0.resid_post": lambda x: x + direction,
        "layers.1.resid_mid": lambda x: x - 0.5 * direction,
        "layers.0.attention.k": lambda x: 1.5 * x,
        "layers.1.attention.q": lambda x: -x,
        "layers.1.attention.heads": lambda x: x.at[:, :, 1].set(0),
        "layers.*.mlp.hidden": lambda x: x.at[..., :7].set(0),
        "embedding": AtPositions(lambda x, at: jnp.where((at == 1)[..., None], 0.0, x)),
    }
    steered = research.variant(llm, edit=edit)
    plain, found = tokens_of(llm, GREEDY), tokens_of(steered, GREEDY)
    assert found == [greedy(llm, prompt, edit) for prompt in PROMPTS]
    assert found != plain
    assert tokens_of(llm, GREEDY) == plain  # is as it was
    assert steered.engine.programs.keys() == llm.engine.programs.keys()
    with count_compilations() as compiled:
        assert tokens_of(steered, GREEDY) == found
    assert not compiled
    # a run of the variant has its edits, and a variant of it adds to them
    whole = logits_of(llm, edit)
    np.testing.assert_allclose(steered.logits(PROMPTS[1]), whole, atol=1e-4)
    np.testing.assert_allclose(logits_of(steered, {}), whole, atol=1e-5)
    back = research.variant(steered, edit={"layers.1.attention.q": lambda x: -x})
    both = {**edit, "layers.1.attention.q": lambda x: x}
    np.testing.assert_allclose(logits_of(back, {}), logits_of(llm, both), atol=1e-4)


def logits_of(llm: LLM, edit: dict[str, Any]) -> jax.Array:
    """Of the second prompt."""
    ids = PROMPTS[1]
    return research.run(llm, filled(ids), edit=edit).logits[0, : len(ids)]


def filled(ids: list[int]) -> list[int]:
    """To a length that all runs here share."""
    return ids + [0] * (16 - len(ids))


SHARES = {10: 0.5, 20: 0.3, 30: 0.2}
DRAWS = 2  # a prompt that begins with this token


def processor(logits: jax.Array, written: Written) -> jax.Array:
    """No token twice, each third one the one before it plus 50; after DRAWS, tokens by their shares."""
    at = jnp.arange(len(logits), dtype=jnp.int32)
    seen = jnp.arange(len(written.tokens), dtype=jnp.int32) < written.length
    free = logits.at[jnp.where(seen, written.tokens, len(logits))].set(-jnp.inf, mode="drop")
    forced = jnp.where(at == (written.tokens[written.length - 1] + 50) % VOCAB, 0.0, -jnp.inf)
    is_third = (written.length - written.prompt_length) % 3 == 2
    shares = sum(jnp.where(at == token, share, 0.0) for token, share in SHARES.items())
    return jnp.where(written.tokens[0] == DRAWS, jnp.log(shares), jnp.where(is_third, forced, free))


@pytest.fixture(scope="module")
def own(llm: LLM) -> LLM:
    return research.variant(llm, logits_processor=processor)


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_logits_processor_decides_what_is_sampled(llm: LLM, own: LLM, params: SamplingParams):
    """The same in a batch as alone; log-probabilities stay the model's."""
    outputs = own.generate(PROMPTS, replace(params, logprobs=1))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        model = jax.nn.log_softmax(llm.logits(ids), axis=-1)
        for i, (token, found) in enumerate(zip(output.token_ids, output.logprobs or (), strict=True)):
            at = len(prompt) + i
            assert token == (ids[at - 1] + 50) % VOCAB if i % 3 == 2 else token not in ids[:at]
            np.testing.assert_allclose(found["logprob"], model[at - 1, token], atol=1e-4)
    assert own.generate([PROMPTS[0]], params)[0].token_ids == outputs[0].token_ids


def test_a_processor_is_a_sampler(own: LLM):
    """Tokens drawn from a distribution of one's own come as often as it says."""
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=20, ignore_eos=True) for seed in range(20)]
    found = [token for output in own.generate([[DRAWS]] * 20, params) for token in output.token_ids]
    assert set(found) == set(SHARES)
    for token, share in SHARES.items():
        assert abs(found.count(token) / 400 - share) < 0.08


def test_verified_guesses_are_processed_like_others(llm: LLM):
    """Each row of a step knows the guesses before it: n-grams guess right what a processor makes periodic."""

    def next_of_seven(logits: jax.Array, written: Written) -> jax.Array:
        wanted = 10 + (written.tokens[written.length - 1] + written.length) % 7
        return jnp.where(jnp.arange(len(logits), dtype=jnp.int32) == wanted, 1.0, 0.0)

    guessing = LLM(llm.model.path, dtype="float32", ctx_size=64, max_num_seqs=4, spec_type="ngram")
    own = research.variant(guessing, logits_processor=next_of_seven)
    ids = [1, 5, 7]
    for _ in range(30):
        ids.append(10 + (ids[-1] + len(ids)) % 7)
    assert own.generate([ids[:3]], replace(GREEDY, max_tokens=30))[0].token_ids == ids[3:]
    assert own.engine.drafts is not None
    assert own.engine.drafts.accepted > 3


def test_what_cannot_be_is_refused_at_once(llm: LLM):
    wrong = [
        ({"edit": {"layers.1.attention.weights": lambda x: x}}, UnsupportedError, "in parts; use"),
        ({"edit": {"layers.*": lambda x: x}}, UnsupportedError, "changes layers.0.attention.weights"),
        ({"edit": {"layers.9.resid_post": lambda x: x}}, RequestError, "names no activation.*2 layers"),
        ({"edit": {"norm": lambda x: x[0]}}, RequestError, "edit of 'norm' gives float32"),
        ({"logits_processor": lambda logits, _: logits[:3]}, RequestError, r"gives float32 \[3\]; give"),
        ({"logits_processor": lambda logits, _: logits > 0}, RequestError, "gives bool"),
    ]
    for how, kind, said in wrong:
        with pytest.raises(kind, match=said):
            research.variant(llm, **how)
