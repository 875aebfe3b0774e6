"""Variants of an LLM: what decodes with edits and a processor is what whole sequences with them say."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, write_model

from realm_jax import LLM, SamplingParams, research
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.research import AtPositions, Written

FREE, DRAWS, PERIODIC = 1, 2, 3  # what a prompt begins with: which rule of the processor its answer follows
PROMPTS = [[FREE, 5, 7, 9], [FREE, 8, 200, 3, 44], [FREE, 20]]
SHARES = {10: 0.5, 20: 0.3, 30: 0.2}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.3, seed=7, max_tokens=8, ignore_eos=True)
DIRECTION = np.random.default_rng(0).standard_normal((1, 1, 64), np.float32)
EDIT = {
    "layers.0.resid_post": lambda x: x + DIRECTION,
    "layers.1.resid_mid": lambda x: x - 0.5 * DIRECTION,
    "layers.0.attention.k": lambda x: 1.5 * x,
    "layers.1.attention.q": lambda x: -x,
    "layers.1.attention.heads": lambda x: x.at[:, :, 1].set(0),
    "layers.*.mlp.hidden": lambda x: x.at[..., :7].set(0),
    "embedding": AtPositions(lambda x, at: jnp.where((at == 1)[..., None], 0.0, x)),
}


def processor(logits: jax.Array, written: Written) -> jax.Array:
    """FREE: no token twice, each third one the one before it plus 50. DRAWS: tokens by their shares."""
    at, last = jnp.arange(len(logits), dtype=jnp.int32), written.tokens[written.length - 1]
    seen = jnp.arange(len(written.tokens), dtype=jnp.int32) < written.length
    fresh = logits.at[jnp.where(seen, written.tokens, len(logits))].set(-jnp.inf, mode="drop")
    forced = jnp.where(at == (last + 50) % VOCAB, 0.0, -jnp.inf)
    is_third = (written.length - written.prompt_length) % 3 == 2
    shares = sum(jnp.where(at == token, share, 0.0) for token, share in SHARES.items())
    periodic = jnp.where(at == 10 + (last + written.length) % 7, 0.0, -jnp.inf)
    rule = written.tokens[0]
    special = jnp.where(rule == DRAWS, jnp.log(shares), periodic)
    return jnp.where(rule == FREE, jnp.where(is_third, forced, fresh), special)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """One that guesses: each row of a step must know the guesses before it."""
    path = write_model(tmp_path_factory.mktemp("variants") / "tiny.gguf", seed=1)
    return LLM(
        path,
        dtype="float32",
        ctx_size=64,
        max_num_seqs=2,
        max_num_batched_tokens=64,
        spec_type="ngram",
        spec_tokens=3,
    )


@pytest.fixture(scope="module")
def own(llm: LLM) -> LLM:
    """In two steps: edits add up, and a processor stays where none is given."""
    first = {name: EDIT[name] for name in list(EDIT)[:3]}
    rest = {name: EDIT[name] for name in list(EDIT)[3:]}
    return research.variant(research.variant(llm, edit=first, logits_processor=processor), edit=rest)


def logits_of(llm: LLM, ids: list[int], edit: dict[str, Any]) -> jax.Array:
    """By whole sequences of one length."""
    return research.run(llm, ids + [0] * (16 - len(ids)), edit=edit).logits[0, : len(ids)]


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_decoding_is_what_whole_sequences_say(llm: LLM, own: LLM, params: SamplingParams):
    """Tokens follow the rule, and greedy ones are the best; log-probabilities are the edited model's."""
    outputs = own.generate(PROMPTS, replace(params, logprobs=1))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = [*prompt, *output.token_ids]
        logits = np.array(logits_of(llm, ids, EDIT))
        model = jax.nn.log_softmax(logits, axis=-1)
        for i, (token, found) in enumerate(zip(output.token_ids, output.logprobs or (), strict=True)):
            at = len(prompt) + i
            np.testing.assert_allclose(found["logprob"], model[at - 1, token], atol=1e-4)
            logits[at - 1, ids[:at]] = -np.inf
            if i % 3 == 2:
                assert token == (ids[at - 1] + 50) % VOCAB
            else:
                assert token not in ids[:at]
                assert params is SAMPLED or token == logits[at - 1].argmax()
    assert own.generate([PROMPTS[0]], params)[0].token_ids == outputs[0].token_ids  # alone as in the batch


def test_edits_change_logits_of_serving_as_of_whole_sequences(llm: LLM, own: LLM):
    ids = PROMPTS[1]
    edited, plain = logits_of(llm, ids, EDIT), logits_of(llm, ids, {})
    assert np.abs(edited - plain).max() > 0.5
    np.testing.assert_allclose(own.logits(ids), edited, atol=1e-4)
    np.testing.assert_allclose(logits_of(own, ids, {}), edited, atol=1e-5)
    np.testing.assert_allclose(llm.logits(ids), plain, atol=1e-4)


def test_a_processor_is_a_sampler(own: LLM):
    """Tokens drawn from a distribution of one's own come as often as it says."""
    params = [SamplingParams(temperature=1, seed=seed, max_tokens=20, ignore_eos=True) for seed in range(20)]
    found = [token for output in own.generate([[DRAWS]] * 20, params) for token in output.token_ids]
    assert set(found) == set(SHARES)
    for token, share in SHARES.items():
        assert abs(found.count(token) / 400 - share) < 0.08


def test_verified_guesses_are_processed_like_others(own: LLM):
    """N-grams guess right what a processor makes periodic."""
    assert own.engine.drafts is not None
    before, ids = own.engine.drafts.accepted, [PERIODIC, 5, 7]
    for _ in range(30):
        ids.append(10 + (ids[-1] + len(ids)) % 7)
    assert own.generate([ids[:3]], replace(GREEDY, max_tokens=30))[0].token_ids == ids[3:]
    assert own.engine.drafts.accepted > before + 3


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
