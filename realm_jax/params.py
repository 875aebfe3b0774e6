"""SamplingParams: facts of a request, with vLLM's names and defaults. No JAX: the scheduler reads it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from realm_jax.errors import RequestError
from realm_jax.structured import StructuredOutput

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKENS = 64
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Temperature divides the logits first; then min_p, top_k and top_p truncate, in this order, each on
    what the one before left; 0 temperature is greedy. Penalties and `logit_bias` act before all of these.

    top_k: 0 or -1 = off. max_tokens: None = to an end token or the context's end.
    seed: None = a random one. stop: strings that end the text, themselves left out.
    stop_token_ids: tokens that end it, kept in token_ids. ignore_eos: end tokens do not stop.
    min_tokens: end and stop tokens are masked until so many tokens stand.
    logprobs: None, or how many best alternatives to report with each token.
    prompt_logprobs: the same for the prompt's tokens; with max_tokens 0, nothing else is computed.
    skip_special_tokens: control tokens are left out of the text.
    n: independent samples of the same prompt.
    structured_output: the form that the text must have; it ends where nothing may follow.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    n: int = 1
    structured_output: StructuredOutput | None = None

    def __post_init__(self) -> None:
        self._freeze_collections()
        for name, low, high in _REALS:
            _check_real(name, getattr(self, name), low, high)
        for name, low, high in _INTEGERS:
            _check_integer(name, getattr(self, name), low, high)
        for name, (low, high) in _OPTIONAL.items():
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), low, high)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if len(self.stop) > MAX_STOPS:
            raise RequestError(f"stop has {len(self.stop)} strings; the limit is {MAX_STOPS}")
        if not isinstance(self.structured_output, StructuredOutput | None):
            raise RequestError(f"structured_output is {self.structured_output!r}; give a StructuredOutput")
        for stop in self.stop:
            if isinstance(stop, str) and len(stop) > MAX_STOP_LENGTH:
                raise RequestError(f"stop has a string of {len(stop):,} characters; the limit is 1,024")
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop has {stop!r}; each must be a string with at least one character")
        _check_token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        _check_token_ids("logit_bias", self.logit_bias, MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias.items():
            _check_real(f"logit_bias[{token}]", bias, -100.0, 100.0)

    def _freeze_collections(self) -> None:
        """What the caller passed is copied: a later change to it changes nothing here."""
        for name in ("stop", "stop_token_ids"):
            value: object = getattr(self, name)
            if isinstance(value, str):
                value = (value,)
            if not isinstance(value, Iterable):
                raise RequestError(f"{name} is {value!r}; it must be a list")
            object.__setattr__(self, name, tuple(value))
        bias: object = self.logit_bias
        if not isinstance(bias, Mapping):
            raise RequestError(f"logit_bias is {bias!r}; it must map token ids to numbers")
        object.__setattr__(self, "logit_bias", MappingProxyType(dict(bias)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied field by field: a mapping proxy cannot be."""
        values = (getattr(self, f.name) for f in fields(self))
        return type(self), tuple(dict(v) if isinstance(v, MappingProxyType) else v for v in values)

    def __hash__(self) -> int:
        values = (getattr(self, f.name) for f in fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, Mapping) else v for v in values))


_REALS = (
    ("temperature", 0.0, 100.0),
    ("top_p", 1e-9, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-3, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_INTEGERS = (("top_k", -1, 1 << 30), ("min_tokens", 0, 1 << 30), ("n", 1, 1024))
_OPTIONAL = {
    "seed": (0, 2**63 - 1),
    "max_tokens": (0, 1 << 30),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}


def _check_real(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}; it must be a number")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value:g}; it must be from {low:g} to {high:g}")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} is {value!r}; it must be a whole number from {low:,} to {high:,}")


def _check_token_ids(name: str, ids: Sequence[int] | Mapping[int, float], limit: int) -> None:
    if len(ids) > limit:
        raise RequestError(f"{name} has {len(ids)} entries; the limit is {limit}")
    for token in ids:
        _check_integer(f"a token id in {name}", token, 0, (1 << 31) - 1)
