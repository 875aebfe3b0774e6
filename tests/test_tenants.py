"""What tenants may do: limits that hold exactly, on a clock of whole nanoseconds."""

import math
from dataclasses import dataclass, field
from fractions import Fraction

import jaxtyping
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from realm_jax.errors import AccessError, LimitError, RequestError
from realm_jax.serving.tenants import ANONYMOUS, LIMITS, MAX_LIMIT, Admission, Limiter, Tenant

SECOND = 10**9


@pytest.fixture(autouse=True)
def only_our_own_checks(monkeypatch: pytest.MonkeyPatch):
    """The tests' runtime type checks would refuse bad types before the code under test does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@dataclass
class Clock:
    now: int = 12345

    def __call__(self) -> int:
        return self.now


@dataclass
class Oracle:
    """Buckets as fractions of a token, each step written out."""

    most: dict[str, int]
    level: dict[str, Fraction] = field(init=False)

    def __post_init__(self) -> None:
        self.level = {limit: Fraction(most) for limit, most in self.most.items()}

    def wait(self, nanoseconds: int) -> None:
        for limit, most in self.most.items():
            self.level[limit] = min(
                self.level[limit] + Fraction(most * nanoseconds, 60 * SECOND), Fraction(most)
            )

    def seconds(self, counts: dict[str, int]) -> Fraction:
        """Until there is room for all of these."""
        missing = [(counts[limit] - self.level[limit]) * 60 / most for limit, most in self.most.items()]
        return max([Fraction(0), *missing])

    def take(self, counts: dict[str, int]) -> None:
        for limit, most in self.most.items():
            self.level[limit] = min(self.level[limit] - counts[limit], Fraction(most))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["wait", "ask", "ask", "end"]),
        st.one_of(st.integers(0, 99), st.sampled_from([SECOND // 7, 5 * SECOND, 20 * SECOND, 70 * SECOND])),
        st.one_of(st.integers(0, 100), st.sampled_from([40, 60, 100])),
    ),
    min_size=5,
    max_size=40,
)
"""What happens, nanoseconds or which one, and a percentage."""


@settings(deadline=None, max_examples=150)
@example([("ask", 0, 0), ("wait", 30 * SECOND, 0), ("ask", 0, 60), ("ask", 0, 80)], 50, 100, 5)
@given(EVENTS, st.integers(1, 50), st.integers(1, 5000), st.integers(1, 5))
def test_the_limiter_is_its_oracle(events: list[tuple[str, int, int]], requests: int, tokens: int, most: int):
    """Refused exactly when a limit is reached, exactly as long, at no cost; what was not used comes back."""
    clock = Clock()
    limiter = Limiter(clock)
    tenant = Tenant("t", requests_per_minute=requests, tokens_per_minute=tokens, concurrent_requests=most)
    oracle = Oracle({"requests_per_minute": requests, "tokens_per_minute": tokens})
    flying: list[Admission] = []
    for kind, amount, size in events:
        if kind == "wait":
            clock.now += amount
            oracle.wait(amount)
        elif kind == "end" and flying:
            ended = flying.pop(amount % len(flying))
            used = ended.charged * size // 100
            for _ in range(2):  # a second time changes nothing
                ended.settle(used)
            oracle.take({"requests_per_minute": 0, "tokens_per_minute": used - ended.charged})
        elif kind == "ask":
            counts = {"requests_per_minute": 1, "tokens_per_minute": tokens * size // 100}
            seconds = oracle.seconds(counts)
            if len(flying) < most and not seconds:
                flying.append(limiter.admit(tenant, counts["tokens_per_minute"]))
                oracle.take(counts)
                continue
            with pytest.raises(LimitError) as refused:
                limiter.admit(tenant, counts["tokens_per_minute"])
            if len(flying) < most:
                assert round(refused.value.retry_after * 1e9) == math.ceil(seconds * SECOND)
        assert limiter.in_flight("t") == len(flying)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**6), st.lists(st.integers(1, 10**6), min_size=1, max_size=20), st.integers(0, 99))
def test_who_comes_again_after_the_seconds_that_were_said_is_let_in_and_not_before(
    most: int, sizes: list[int], share: int
):
    clock = Clock()
    limiter, tenant = Limiter(clock), Tenant("t", tokens_per_minute=most)
    for size in sizes:
        count = size % (most + 1)
        try:
            limiter.admit(tenant, count)
        except LimitError as error:
            begun, wait = clock.now, round(error.retry_after * 1e9)
            for early in {wait - 1, wait * share // 100}:
                clock.now = begun + early
                with pytest.raises(LimitError):
                    limiter.admit(tenant, count)
            clock.now = begun + wait
            limiter.admit(tenant, count)


def test_tenants_do_not_share_limits():
    limiter = Limiter(Clock())
    for name in ("a", "b"):
        limiter.admit(Tenant(name, requests_per_minute=1, concurrent_requests=1))
        with pytest.raises(LimitError):
            limiter.admit(Tenant(name, requests_per_minute=1, concurrent_requests=1))


def test_a_limit_may_change_while_requests_run():
    clock = Clock()
    limiter = Limiter(clock)
    before = limiter.admit(Tenant("t", tokens_per_minute=1000), 600)
    limiter.admit(Tenant("t", tokens_per_minute=100), 100)
    with pytest.raises(LimitError, match="has used its 100 tokens per minute"):
        limiter.admit(Tenant("t", tokens_per_minute=100), 1)
    limiter.admit(Tenant("t"), 10**9)
    before.settle(0)
    assert limiter.in_flight("t") == 2


def test_what_never_fits_is_no_matter_of_time():
    with pytest.raises(
        RequestError, match=r"are 101 tokens; tenant t may use 100 a minute \(lower max_tokens\)"
    ):
        Limiter(Clock()).admit(Tenant("t", tokens_per_minute=100), 101)


@example(10, None, 5000, None, None, 100, 4)
@given(
    st.integers(1, 5000),
    st.one_of(st.none(), st.integers(0, 5000)),
    st.integers(1, 5000),
    st.one_of(st.none(), st.integers(1, 5000)),
    st.one_of(st.none(), st.integers(1, 5000)),
    st.one_of(st.none(), st.integers(1, 5000)),
    st.integers(1, 4),
)
def test_new_tokens_stay_within_every_limit(
    prompt: int,
    asked: int | None,
    context: int,
    own: int | None,
    most: int | None,
    minute: int | None,
    samples: int,
):
    tenant = Tenant("t", max_context_tokens=own, max_tokens=most, tokens_per_minute=minute)
    room = min(context, own or context) - prompt
    is_refused = room < (asked != 0) or (asked is not None and most is not None and asked > most)
    if is_refused:
        with pytest.raises(RequestError, match="tenant t "):
            tenant.new_tokens(prompt, asked, context, samples)
        return
    found = tenant.new_tokens(prompt, asked, context, samples)
    assert found <= room and found <= (most or found)
    if asked is not None:
        assert found == min(asked, room)
    else:
        assert found >= 1
        if minute is not None and prompt + samples <= minute:  # what is not asked for, no limit refuses
            Limiter(Clock()).admit(tenant, prompt + samples * found)


def test_adapters_and_models_are_those_that_were_granted():
    tenant = Tenant("t", models=("small",), adapters=("poet", "clerk"), default_adapter="clerk")
    assert tenant.chosen_adapters(None) == (("clerk", 1.0),)
    assert tenant.chosen_adapters(()) == ()
    assert tenant.chosen_adapters((("poet", 0.5),)) == (("poet", 0.5),)
    with pytest.raises(AccessError, match="tenant t may not use adapter 'judge'; it may use poet, clerk"):
        tenant.chosen_adapters((("poet", 1.0), ("judge", 1.0)))
    tenant.check_model("small")
    with pytest.raises(AccessError, match="tenant t may not use model 'large'; it may use small"):
        tenant.check_model("large")
    with pytest.raises(AccessError, match="may use none"):
        Tenant("t").chosen_adapters((("poet", 1.0),))
    ANONYMOUS.check_model("any")
    assert ANONYMOUS.chosen_adapters((("poet", 1.0),)) and ANONYMOUS.chosen_adapters(None) == ()


BAD: list[tuple[str, object]] = [("name", each) for each in ("", ".a", "a b", "a\n", "ä", "a" * 65, 5, None)]
BAD += [(limit, each) for limit in LIMITS for each in (0, -1, 1.5, True, "5", MAX_LIMIT + 1, math.nan)]
BAD += [("weight", each) for each in (0, -1, math.nan, math.inf, True, "1", None, 1001)]
BAD += [
    (name, each) for name in ("models", "adapters") for each in ("abc", [1], ["a b"], ["a"] * 257, None, [""])
]
BAD += [("system_prompt", 5), ("system_prompt", "x" * 16_385), ("is_admin", 1), ("default_adapter", "poet")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_field_is_refused_by_name(name: str, value: object):
    with pytest.raises(RequestError) as caught:
        Tenant.from_options(**{"name": "t", name: value})
    message = str(caught.value)
    assert message.startswith((f"{name} is ", f"{name} has ")) and len(message) < 300 and "\n" not in message


def test_an_unknown_field_lists_the_known_ones():
    with pytest.raises(RequestError, match=r"unknown field 'weigth'; known: name, models, "):
        Tenant.from_options(name="t", weigth=1)
