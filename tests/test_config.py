"""EngineConfig refuses bad values by name; Buckets keep the laws that bound what is compiled."""

import dataclasses
from typing import Any

import jaxtyping
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from realm_jax.config import (
    BLOCK,
    MIN_ROWS,
    Activation,
    Buckets,
    EngineConfig,
    LayerKind,
    ModelConfig,
    RopeConfig,
)
from realm_jax.errors import RequestError

MOST_PROGRAMS = 24
CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "weights": ("auto", "dense"),
    "kv_dtype": ("auto", "bfloat16", "float32"),
    "device": ("auto", "cpu", "gpu", "tpu"),
}
LIMITS = {"ctx_size": 2**24, "max_num_seqs": 2**24, "threads": 2**24, "memory": 2**60}
BAD = [(name, value) for name in CHOICES for value in ("", "AUTO", "float16", None, 1, ["auto"])]
BAD += [(name, value) for name in LIMITS for value in (0, -1, 1.0, True, "4", [4], float("nan"))]
BAD += [(name, limit + 1) for name, limit in LIMITS.items()]
BAD += [("max_num_seqs", None)]
BAD += [("offline", value) for value in (None, 1, "no")]


@pytest.fixture(autouse=True)
def only_our_own_checks(monkeypatch: pytest.MonkeyPatch):
    """The tests' runtime type checks would refuse bad types before the code under test does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name_and_value(name: str, value: object):
    with pytest.raises(RequestError) as caught:
        EngineConfig.from_options(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}; ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in CHOICES.items() for value in values]
    + [(name, value) for name, limit in LIMITS.items() for value in (1, limit)]
    + [("ctx_size", None), ("threads", None), ("memory", None), ("offline", True)],
)
def test_a_good_value_is_kept(name: str, value: object):
    config = EngineConfig.from_options(**{name: value})
    assert getattr(config, name) == value
    hash(config)


def test_an_unknown_option_lists_the_known_ones():
    with pytest.raises(RequestError) as caught:
        EngineConfig.from_options(ctx_sise=1, top_k=3, offline=True)
    message = str(caught.value)
    assert message.startswith("unknown option ctx_sise, top_k; known: ")
    assert all(field.name in message for field in dataclasses.fields(EngineConfig))


def test_configurations_are_frozen():
    for config in (EngineConfig(), Buckets.plan(512, 4)):
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.__setattr__(name, None)


def model_of(context: int) -> ModelConfig:
    """Facts of a small llama trained for this context."""
    return ModelConfig(
        architecture="llama",
        vocab_size=320,
        context_length=context,
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_size=96,
        norm_eps=1e-5,
        ropes=(("global", RopeConfig(16, 10_000.0, True)),),
        layers=(LayerKind(),),
        activation=Activation.SILU,
        attention_scale=0.25,
        attention_softcap=None,
        logit_softcap=None,
        embedding_scale=1.0,
        qk_norm=False,
        post_norms=False,
        moe=None,
    )


@pytest.mark.parametrize(
    ("trained", "asked", "expected"), [(9000, None, 4096), (300, None, 300), (300, 300, 300)]
)
def test_the_context_is_what_was_asked_for_or_the_models_up_to_4096(trained: int, asked: Any, expected: int):
    assert EngineConfig(ctx_size=asked).context_for(model_of(trained)) == expected


def test_a_context_beyond_the_models_is_refused():
    with pytest.raises(RequestError, match="context is 5,000 tokens; the model was trained for 4,096"):
        EngineConfig(ctx_size=5000).context_for(model_of(4096))


contexts = st.one_of(st.integers(1, 200_000), st.integers(1, 1100))


@given(contexts, st.integers(1, 256))
@example(1, 1)
@example(200_000, 256)
@example(4096, 16)
@example(256, 4)
@example(257, 17)
def test_every_plan_keeps_the_laws(context: int, max_num_seqs: int):
    buckets = Buckets.plan(context, max_num_seqs)
    capacities = [pool.capacity for pool in buckets.pools]
    assert all(capacity % BLOCK == 0 for capacity in capacities)
    assert capacities == sorted(set(capacities))
    assert context <= capacities[-1] < context + BLOCK
    for pool in buckets.pools:
        assert pool.rows == tuple(sorted(set(pool.rows)))
        assert pool.rows[0] >= MIN_ROWS
        assert pool.rows[-1] == pool.slots
        assert pool.slots <= max(max_num_seqs, MIN_ROWS)
        for used in range(1, pool.slots + 1):
            assert pool.rows_for(used) == min(rows for rows in pool.rows if rows >= used)
    slots = [pool.slots for pool in buckets.pools]
    assert slots == sorted(slots, reverse=True)
    assert slots[0] == max(max_num_seqs, MIN_ROWS)
    assert buckets.max_num_seqs == max_num_seqs
    assert buckets.cached_tokens == sum(pool.slots * pool.capacity for pool in buckets.pools)
    names = buckets.programs()
    assert len(set(names)) == len(names) <= MOST_PROGRAMS
    assert hash(buckets) == hash(Buckets.plan(context, max_num_seqs))
    assert buckets == Buckets.plan(context, max_num_seqs)


@given(st.integers(1, BLOCK))
def test_a_chunk_is_the_smallest_that_fits(tokens: int):
    buckets = Buckets.plan(4096, 16)
    assert buckets.chunk_for(tokens) == min(chunk for chunk in buckets.chunks if chunk >= tokens)
    assert max(buckets.chunks) == BLOCK
