"""EngineConfig refuses bad values by name."""

import dataclasses
from typing import Any

import jaxtyping
import pytest

from realm_jax.config import Activation, EngineConfig, LayerKind, ModelConfig, QKNorm, RopeConfig
from realm_jax.errors import RequestError

CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "weights": ("auto", "dense", "quantized", "int8"),
    "kernels": ("auto", "reference", "xla", "pallas", "native"),
    "kv_dtype": ("auto", "bfloat16", "float32", "int8"),
    "device": ("auto", "cpu", "gpu", "tpu"),
}
LIMITS = {"max_num_seqs": 2**24, "max_num_batched_tokens": 2**20}
OPEN_LIMITS = {"ctx_size": 2**24, "max_queue": 2**24, "threads": 2**24, "memory": 2**60}  # or None
SWITCHES = ("prefix_caching", "deterministic", "offline")
BAD = [(name, value) for name in CHOICES for value in ("", "AUTO", "float16", None, 1, ["auto"])]
BAD += [(n, value) for n in LIMITS | OPEN_LIMITS for value in (0, -1, 1.0, True, "4", [4], float("nan"))]
BAD += [(name, limit + 1) for name, limit in (LIMITS | OPEN_LIMITS).items()]
BAD += [(name, None) for name in LIMITS]
BAD += [(name, value) for name in SWITCHES for value in (None, 1, "no")]


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
    + [(name, value) for name, limit in (LIMITS | OPEN_LIMITS).items() for value in (1, limit)]
    + [(name, None) for name in OPEN_LIMITS]
    + [(name, value) for name in SWITCHES for value in (True, False)],
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
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().__setattr__("ctx_size", 1)


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
        activation=Activation.SWIGLU,
        attention_scale=0.25,
        attention_softcap=None,
        logit_softcap=None,
        embedding_scale=1.0,
        qk_norm=QKNorm.NONE,
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
