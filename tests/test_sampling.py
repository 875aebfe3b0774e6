"""sample() against a NumPy oracle, against exact distributions, and against itself in other batches."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_oracle import PROMPT, ROWS, compiled, draw, expected, gumbel, rows_of, truncated

from realm_jax.kernels import first_argmax, threshold, top_k
from realm_jax.params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, SamplingParams
from realm_jax.sampling import CANDIDATES, TokenLogprobs
from realm_jax.sampling_rows import SamplingRows, TokenCounts

COMBINATIONS = [
    SamplingParams(temperature=t, min_p=m, top_k=k, top_p=p)
    for t, m, k, p in itertools.product(
        (0.0, 0.3, 1.0, 4.0), (0.0, 0.02, 0.5), (-1, 0, 1, 5, 300), (1e-9, 0.4, 0.95, 1.0)
    )
]


@pytest.mark.parametrize(
    ("vocab", "spread"), [(3, 1), (256, 2), (257, 0.2), (1000, 2), (1000, 0.3), (9001, 1)]
)
def test_the_token_is_the_best_noisy_one_of_those_that_truncation_leaves(vocab: int, spread: float):
    rng = np.random.default_rng(vocab)
    rows = rows_of(COMBINATIONS, vocab)
    R, unclear = len(COMBINATIONS), 0
    for position in (PROMPT, 500):
        noise = gumbel(range(R), np.full(R, position), vocab)
        logits = (spread * rng.standard_normal((R, vocab))).astype(np.float32)
        tokens, _ = draw(logits, rows, np.full(R, position))
        for i, p in enumerate(COMBINATIONS):
            wanted = expected(logits[i], p, noise[i])
            unclear += wanted is None
            assert wanted in (None, tokens[i]), f"row {i}: {p}"
    assert unclear < 0.05 * 2 * R


@pytest.mark.parametrize("vocab", [256, 1000])
def test_of_equal_logits_only_those_that_truncation_leaves_are_drawn(vocab: int):
    params = [
        SamplingParams(top_k=k, top_p=p, min_p=m)
        for k, p, m in itertools.product((0, 3, 20, 300), (0.3, 0.9, 1.0), (0.0, 0.9))
    ]
    repeated = [p for p in params for _ in range(10)]
    logits = np.random.default_rng(0).integers(0, 4, (1, vocab)).repeat(len(repeated), 0).astype(np.float32)
    tokens, _ = draw(logits, rows_of(repeated, vocab), np.full(len(repeated), PROMPT))
    for token, p in zip(tokens, repeated, strict=True):
        is_ranked = vocab <= CANDIDATES or 0 < p.top_k <= CANDIDATES
        assert truncated(logits[0].astype(np.float64), p, whole_ties=not is_ranked)[token]
    assert len(set(tokens.tolist())) > vocab / 20


def test_greedy_is_the_first_maximum():
    logits = np.zeros((3, 1000), np.float32)
    logits[0, [17, 400, 999]] = 2.0
    logits[1] = -np.inf
    logits[1, 999] = -5.0
    tokens, _ = draw(logits, rows_of([SamplingParams(temperature=0)] * 3, 1000), np.full(3, PROMPT))
    assert tokens.tolist() == [17, 999, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 2e-38, 1.5e-37, 1e-30, 1e-6, 1e-3])
def test_a_tiny_temperature_picks_the_best(temperature: float):
    logits = np.random.default_rng(0).permuted(np.linspace(-30, 40, 1000), axis=0)[None].repeat(3, 0)
    one = SamplingParams(temperature=temperature)
    many = [one, dataclasses.replace(one, top_p=0.9), dataclasses.replace(one, top_k=500)]
    tokens, _ = draw(logits, rows_of(many, 1000), np.full(3, PROMPT))
    assert tokens.tolist() == np.argmax(logits, axis=-1).tolist()


def adjusted(logits: np.ndarray, p: SamplingParams, prompt: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Bias, then CTRL's repetition penalty, then OpenAI's frequency and presence penalties."""
    x = logits.astype(np.float64)
    for token, bias in p.logit_bias.items():
        x[token] += bias
    repeated = np.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
    x = np.where(prompt | (generated > 0), repeated, x)
    return x - generated * p.frequency_penalty - (generated > 0) * p.presence_penalty


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_penalties_bias_and_early_stops(temperature: float):
    vocab, rng = 256, np.random.default_rng(1)
    params = [
        SamplingParams(
            temperature=temperature,
            repetition_penalty=r,
            frequency_penalty=f,
            presence_penalty=s,
            logit_bias=b,
            min_tokens=m,
            stop_token_ids=(0, 1, 255),
        )
        for r, f, s, b, m in itertools.product(
            (1.0, 1.8, 0.5), (0.0, 1.5, -1.0), (0.0, 2.0), ({}, {0: 5.0, 255: -100, 7: 0.5}), (0, 2, 9)
        )
    ]
    R = len(params)
    logits = (2 * rng.standard_normal((R, vocab))).astype(np.float32)
    logits[:, 0] += 3  # a stop token would often come
    prompt, generated = rng.random((R, vocab)) < 0.3, rng.integers(0, 3, (R, vocab))
    counts = TokenCounts(jnp.asarray(prompt), jnp.asarray(generated, jnp.int32))
    position = PROMPT + 2  # two tokens stand
    tokens, _ = draw(logits, rows_of(params, vocab), np.full(R, position), counts)
    noise = gumbel(range(R), np.full(R, position), vocab)
    for i, p in enumerate(params):
        x = adjusted(logits[i], p, prompt[i], generated[i])
        if p.min_tokens > 2:
            x[list(p.stop_token_ids)] = -np.inf
        assert expected(x, p, noise[i]) in (None, tokens[i])
        assert not (p.min_tokens > 2 and tokens[i] in p.stop_token_ids)


def test_the_longest_lists_that_params_allow_fit_a_row():
    vocab = 1000
    p = SamplingParams(
        temperature=0,
        min_tokens=1,
        logit_bias=dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0),
        stop_token_ids=range(MAX_STOP_TOKENS),
    )
    ends = tuple(range(990, 1000))  # the model's own
    logits = np.zeros((1, vocab), np.float32)
    tokens, _ = draw(logits, rows_of([p], vocab, stop_ids=(*p.stop_token_ids, *ends)), np.array([PROMPT]))
    assert tokens.tolist() == [MAX_STOP_TOKENS]


@pytest.mark.parametrize("vocab", [3, 1000])
def test_logprobs_are_the_models_own(vocab: int):
    rng = np.random.default_rng(2)
    params = [
        SamplingParams(temperature=t, top_k=2, repetition_penalty=1.5, logit_bias={1: 20.0}, logprobs=n)
        for t in (0.0, 0.7)
        for n in (0, 3, MAX_LOGPROBS)
    ]
    logits = (5 * rng.standard_normal((len(params), vocab))).astype(np.float32)
    logits[:, 2] = -np.inf
    tokens, found = draw(logits, rows_of(params, vocab), np.full(len(params), PROMPT))
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    each = np.arange(len(params))
    chosen, top_ids, top = (np.asarray(x)[: len(params)] for x in jax.tree.leaves(found))
    np.testing.assert_allclose(chosen, exact[each, tokens], rtol=1e-5, atol=1e-5)
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    assert top_ids.tolist() == order.tolist()
    np.testing.assert_allclose(top, np.take_along_axis(exact, order, -1), rtol=1e-5, atol=1e-5)


MIXED = [
    SamplingParams(temperature=0, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.95, top_k=40, logprobs=5),
    SamplingParams(temperature=0.8, top_p=0.95, logprobs=5),
    SamplingParams(temperature=1.0, logprobs=0),
    SamplingParams(temperature=1.5, top_k=400, top_p=0.8, min_p=0.001, logprobs=1),
    SamplingParams(temperature=1.0, repetition_penalty=1.3, logit_bias={5: 3.0}, min_tokens=3, logprobs=0),
]


def bits(logprobs: TokenLogprobs, row: int) -> bytes:
    return b"".join(np.asarray(leaf)[row].tobytes() for leaf in jax.tree.leaves(logprobs))


@pytest.mark.parametrize("vocab", [257, 9001])
def test_a_row_does_not_depend_on_the_batch_around_it(vocab: int):
    rng = np.random.default_rng(3)
    for params in MIXED:
        logits = (0.7 * rng.standard_normal(vocab)).astype(np.float32)
        seen = set()
        for R in (1, 4, 19):
            for place in {0, R // 2, R - 1}:
                others = [MIXED[rng.integers(len(MIXED))] for _ in range(R)]
                others[place] = params
                seeds = [77 if i == place else i for i in range(R)]
                batch = (rng.choice([0.1, 3, 30]) * rng.standard_normal((R, vocab))).astype(np.float32)
                batch[place] = logits
                active = rng.random(R) < 0.7
                batch[~active] = rng.choice([np.nan, np.inf, -np.inf, 1.0])
                active[place], batch[place] = True, logits
                generated = rng.integers(0, 2, (R, vocab))
                generated[place] = np.arange(vocab) % 2
                counts = TokenCounts(
                    jnp.asarray(rng.random((R, vocab)) < 0.1), jnp.asarray(generated, jnp.int32)
                )
                counts = dataclasses.replace(counts, in_prompt=counts.in_prompt.at[place].set(False))
                at = rng.integers(PROMPT, 99, R)
                at[place] = PROMPT + 1
                rows = rows_of(others, vocab, seeds=seeds)
                tokens, logprobs = compiled(
                    jnp.asarray(batch), rows, counts, jnp.asarray(at, jnp.int32), jnp.asarray(active)
                )
                seen.add((int(tokens[place]), bits(logprobs, place)))
        assert len(seen) == 1, params


def chi_square(params: SamplingParams, logits: np.ndarray, drawn_with: SamplingParams | None = None) -> float:
    """Standard deviations by which 20,000 draws are off the exact distribution (about 0 if it is right)."""
    R, vocab, calls = ROWS, len(logits), 84
    scaled = logits.astype(np.float64) / params.temperature
    exact = np.where(truncated(scaled, params), np.exp(scaled - scaled.max()), 0.0)
    exact *= R * calls / exact.sum()
    rows = rows_of([drawn_with or params] * R, vocab)
    batch = np.broadcast_to(logits, (R, vocab))
    found = np.zeros(vocab)
    for position in range(calls):
        tokens, _ = draw(batch, rows, np.full(R, PROMPT + position))
        found += np.bincount(tokens, minlength=vocab)
    order = np.argsort(-exact, kind="stable")
    bins = np.minimum(np.cumsum(exact[order]) // 100, R * calls // 100 - 1).astype(int)
    wanted, got = (np.bincount(bins, weights=counts[order]) for counts in (exact, found))
    wanted, got = wanted[wanted > 0], got[wanted > 0]
    freedom = len(wanted) - 1
    return (((got - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5


SHAPES = {
    "candidates, top_k": (SamplingParams(temperature=0.9, top_k=40), 2.0),
    "candidates, top_p": (SamplingParams(temperature=0.9, top_p=0.9), 3.0),
    "all, untruncated": (SamplingParams(temperature=1.0), 1.0),
    "all, top_p": (SamplingParams(temperature=1.2, top_p=0.9), 0.5),
    "all, top_k and top_p": (SamplingParams(temperature=1.2, top_k=500, top_p=0.9), 0.5),
    "all, min_p": (SamplingParams(temperature=1.0, min_p=0.1), 0.5),
}


@pytest.mark.parametrize("name", SHAPES)
def test_draws_follow_the_exact_distribution_and_no_other(name: str):
    params, spread = SHAPES[name]
    logits = (spread * np.random.default_rng(4).standard_normal(1000)).astype(np.float32)
    scaled = logits.astype(np.float64) / params.temperature
    assert (truncated(scaled, params).sum() > CANDIDATES) == name.startswith("all")
    assert chi_square(params, logits) < 4.5
    warmer = dataclasses.replace(params, temperature=params.temperature * 1.15)
    assert chi_square(params, logits, drawn_with=warmer) > 4.5


def test_noise_is_a_function_of_seed_sample_and_position():
    vocab, params = 1000, [SamplingParams()] * 200
    logits = np.zeros((200, vocab))

    def stream(seed: int, sample_index: int, first: int) -> list[int]:
        rows = rows_of(params, vocab, seeds=[seed] * 200, sample_index=sample_index)
        return draw(logits, rows, first + np.arange(200))[0].tolist()

    base = stream(5, 0, 20)
    assert stream(5, 0, 20) == base
    assert stream(5, 0, 21)[:-1] == base[1:]
    others = [stream(5, 1, 20), stream(6, 0, 20), stream(5 + 2**32, 0, 20), stream(5, 0, 300)]
    for one, other in itertools.combinations([base, *others], 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 0.5 by chance
    largest = 2**63 - 1
    one = SamplingRows.of(SamplingParams(), seed=largest, sample_index=0, stop_ids=(), prompt=1, vocab=2)
    assert one.seed.tolist() == [[2**31 - 1, 2**32 - 1]]
    noise = gumbel([largest] * 200, 20 + np.arange(200), vocab, sample_index=3)
    assert stream(largest, 3, 20) == noise.argmax(axis=-1).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("vocab", [1, 1000])
def test_rows_without_meaning_end_and_give_a_token(value: float, vocab: int):
    logits = np.full((len(MIXED), vocab), value, np.float32)
    biased = [dataclasses.replace(p, logit_bias={}) for p in MIXED]
    for some in (logits, np.where(np.arange(vocab) == 0, 1.0, logits)):
        tokens, _ = draw(some, rows_of(biased, vocab), np.full(len(MIXED), PROMPT))
        assert ((tokens >= 0) & (tokens < vocab)).all()


def test_masked_tokens_never_come():
    vocab, R = 1000, 240
    logits = np.where(np.arange(vocab) % 2 == 0, -np.inf, 0.0)[None].repeat(R, 0)
    for params in (SamplingParams(), SamplingParams(top_p=0.99), SamplingParams(top_k=450, top_p=0.99)):
        tokens, _ = draw(logits, rows_of([params] * R, vocab), np.full(R, PROMPT))
        assert (tokens % 2 == 1).all()


@pytest.mark.parametrize("vocab", [1, 15, 300, 641, 9001])
def test_the_best_of_a_row_are_found_without_a_sort(vocab: int):
    rng = np.random.default_rng(vocab)
    some = rng.standard_normal((3, vocab))
    tied = rng.geometric(0.3, (3, vocab))
    for each in (some, tied, np.where(rng.random((3, vocab)) < 0.9, -np.inf, some)):
        x = each.astype(np.float32)
        count = min(20, vocab)
        values, ids = top_k(jnp.asarray(x), count)
        order = np.argsort(-x, axis=-1, kind="stable")[:, :count]
        assert np.asarray(ids).tolist() == order.tolist()
        assert np.asarray(values).tolist() == np.take_along_axis(x, order, axis=-1).tolist()
        assert np.asarray(first_argmax(jnp.asarray(x))).tolist() == x.argmax(axis=-1).tolist()
        for target in (0, 1, vocab // 2, vocab):
            amounts = jnp.ones(x.shape, jnp.float32)
            found = threshold(jnp.asarray(x), amounts, jnp.full(3, target, jnp.float32))
            exact = np.sort(x)[:, vocab - target] if target else np.full(3, -np.inf)
            kept = np.asarray(jnp.asarray(x) >= found[:, None])  # the device takes subnormal numbers for 0
            assert (kept == (x >= exact[:, None])).all()
