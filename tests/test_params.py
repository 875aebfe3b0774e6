"""SamplingParams: what is allowed, and that every bad value is refused by the name of its field."""

import dataclasses
import math
import re
from typing import Any

import jaxtyping
import pytest

from realm_jax.errors import RequestError
from realm_jax.params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_TOKENS, SamplingParams

REALS = {
    "temperature": (0.0, 100.0),
    "top_p": (1e-9, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 100.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
INTEGERS = {
    "top_k": (-1, 2**30),
    "min_tokens": (0, 2**30),
    "n": (1, 1024),
    "seed": (0, 2**63 - 1),
    "max_tokens": (0, 2**30),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "logprobs": (0, MAX_LOGPROBS),
}
NOT_NUMBERS = ["1", True, False, [1], 1j, math.nan, math.inf, -math.inf, b"1"]
OPTIONAL = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}

BAD = [(name, value) for name in REALS for value in [*NOT_NUMBERS, None]]
BAD += [(name, value) for name in INTEGERS for value in [*NOT_NUMBERS, 1.0, 1.5]]
BAD += [(name, None) for name in INTEGERS if name not in OPTIONAL]
BAD += [(name, low - 0.5) for name, (low, _) in REALS.items()]
BAD += [(name, high + 0.5) for name, (_, high) in REALS.items()]
BAD += [(name, low - 1) for name, (low, _) in INTEGERS.items()]
BAD += [(name, high + 1) for name, (_, high) in INTEGERS.items()]


@pytest.fixture(autouse=True)
def only_our_own_checks(monkeypatch: pytest.MonkeyPatch):
    """The tests' runtime type checks would refuse bad types before the code under test does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def make(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_number_is_refused_by_name_and_value(name: str, value: object):
    with pytest.raises(RequestError) as caught:
        make(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    shown = message.removeprefix(f"{name} is ").partition(";")[0]
    assert shown in (repr(value), f"{value:g}" if isinstance(value, int | float) else "")
    assert "\n" not in message


@pytest.mark.parametrize("name", [*REALS, *INTEGERS])
def test_both_ends_of_a_range_are_allowed(name: str):
    for value in {**REALS, **INTEGERS}[name]:
        assert getattr(make(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 7]}, "stop has 7"),
        ({"stop": 7}, "stop is 7"),
        ({"stop": None}, "stop is None"),
        ({"stop_token_ids": [1, -1]}, "a token id in stop_token_ids is -1"),
        ({"stop_token_ids": [2**31]}, f"stop_token_ids is {2**31}"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids is 1.0"),
        ({"stop_token_ids": [True]}, "stop_token_ids is True"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12'"),
        ({"stop_token_ids": 7}, "stop_token_ids is 7"),
        ({"stop_token_ids": None}, "stop_token_ids is None"),
        ({"stop_token_ids": range(MAX_STOP_TOKENS + 1)}, f"has {MAX_STOP_TOKENS + 1} entries"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias is -1"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias is '5'"),
        ({"logit_bias": {5: 100.5}}, "logit_bias[5] is 100.5"),
        ({"logit_bias": {5: -101}}, "logit_bias[5] is -101"),
        ({"logit_bias": {5: math.nan}}, "logit_bias[5] is nan"),
        ({"logit_bias": {5: "1"}}, "logit_bias[5] is '1'"),
        ({"logit_bias": [5]}, "logit_bias is [5]"),
        ({"logit_bias": None}, "logit_bias is None"),
        ({"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)}, f"has {MAX_LOGIT_BIAS + 1} entries"),
        ({"ignore_eos": 1}, "ignore_eos is 1"),
        ({"ignore_eos": None}, "ignore_eos is None"),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'"),
    ],
)
def test_a_bad_collection_or_flag_is_refused_by_name_and_value(fields: dict[str, Any], named: str):
    with pytest.raises(RequestError, match=re.escape(named)) as caught:
        make(**fields)
    (name,) = fields
    assert name in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_the_defaults_are_those_of_the_contract():
    params = SamplingParams()
    contract = {"temperature": 1.0, "top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
    contract |= {
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "max_tokens": None,
        "min_tokens": 0,
        "prompt_logprobs": None,
    }
    contract |= {
        "seed": None,
        "stop": (),
        "stop_token_ids": (),
        "ignore_eos": False,
        "skip_special_tokens": True,
        "logprobs": None,
        "n": 1,
        "structured_output": None,
    }
    assert {name: getattr(params, name) for name in contract} == contract
    assert params.logit_bias == {}
    assert {field.name for field in dataclasses.fields(params)} == {*contract, "logit_bias"}


def test_params_are_frozen_and_collections_become_tuples():
    params = make(stop="end", stop_token_ids=[3, 4])
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3, 4)
    assert make(stop=["a", "b"]).stop == ("a", "b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.__setattr__("top_k", 3)


def test_a_bias_does_not_change_with_the_callers_mapping():
    mapping = {5: 1.0}
    params = make(logit_bias=mapping)
    mapping[6] = 1e9
    assert params.logit_bias == {5: 1.0}


def test_a_copy_with_another_value_is_checked_too():
    with pytest.raises(RequestError, match=r"^n is 0;"):
        dataclasses.replace(SamplingParams(n=2), n=0)
    assert dataclasses.replace(make(stop=["a"], logit_bias={1: 2.0}), n=3).stop == ("a",)
