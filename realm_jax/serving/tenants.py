"""What a tenant may do, and how much of it. Plain Python: no I/O, no JAX; the caller's clock.

A request is charged its prompt and all tokens that it may generate when it comes, so that a tenant never has
more than its limit in hand; when it has ended, what it did not use is given back (`Admission.settle`). What
is refused costs nothing.
"""

import math
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from realm_jax.errors import AccessError, LimitError, RequestError

EVERY = "*"
"""In a list of models or adapters: all of them."""

MINUTE = 60_000_000_000  # nanoseconds
MAX_PROMPT = 16_384  # characters of a system prompt
MAX_NAMES = 256
MAX_LIMIT = 10**12
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LISTED = re.compile(r"[^\s\x00-\x1f\x7f]{1,256}")


@dataclass(frozen=True)
class Tenant:
    """Facts of a tenant; a limit that is None is none.

    models, adapters: names that its requests may use; "*" = every one. default_adapter: of requests that
    name none. system_prompt: of chats that bring none. requests_per_minute, tokens_per_minute: at most so
    many at once, too, after a minute without any. tokens: of prompts, and generated. concurrent_requests:
    in flight, waiting ones included. weight: its share of the engine is to the others' as this, where they
    wait, too. max_context_tokens: of a request's prompt and answer; max_tokens: of its answer. is_admin:
    may change what all tenants share.
    """

    name: str
    models: tuple[str, ...] = (EVERY,)
    adapters: tuple[str, ...] = ()
    default_adapter: str | None = None
    system_prompt: str | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    weight: float = 1.0
    max_context_tokens: int | None = None
    max_tokens: int | None = None
    is_admin: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        for name in ("models", "adapters"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in LIMITS:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= MAX_LIMIT):
                raise RequestError(
                    f"{name} is {shortened(value)}; give a whole number from 1 to {MAX_LIMIT:,}"
                )
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise RequestError(f"weight is {shortened(self.weight)}; give a number from 0.001 to 1000")
        if not 0.001 <= self.weight <= 1000:
            raise RequestError(f"weight is {shortened(self.weight)}; give a number from 0.001 to 1000")
        object.__setattr__(self, "weight", float(self.weight))
        if not isinstance(self.is_admin, bool):
            raise RequestError(f"is_admin is {shortened(self.is_admin)}; give true or false")
        _check_text("system_prompt", self.system_prompt, MAX_PROMPT)
        _check_text("default_adapter", self.default_adapter, 256)
        if self.default_adapter is not None and not self._may_use("adapters", self.default_adapter):
            raise RequestError(
                f"default_adapter is {self.default_adapter!r}, which adapters does not have; add it there"
            )

    @classmethod
    def from_options(cls, **options: object) -> "Tenant":
        """The tenant with these fields; an unknown name is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            given = ", ".join(shortened(name) for name in unknown[:5])
            raise RequestError(f"unknown field {given}; known: {', '.join(known)}")
        return cls(**options)  # pyright: ignore[reportArgumentType]: checked in __post_init__

    def check_model(self, model: str) -> None:
        """Raises AccessError if the tenant may not use the model."""
        if not self._may_use("models", model):
            raise AccessError(
                f"tenant {self.name} may not use model {shortened(model)}; it may use {self._list('models')}"
            )

    def chosen_adapters(self, asked: tuple[tuple[str, float], ...] | None) -> tuple[tuple[str, float], ...]:
        """The adapters of a request, its own or the default one. asked: None if it says nothing of them.

        Raises AccessError if the tenant may not use one of them.
        """
        if asked is None:
            return ((self.default_adapter, 1.0),) if self.default_adapter is not None else ()
        for name, _ in asked:
            if not self._may_use("adapters", name):
                raise AccessError(
                    f"tenant {self.name} may not use adapter {shortened(name)}; "
                    f"it may use {self._list('adapters')}"
                )
        return asked

    def new_tokens(self, prompt: int, asked: int | None, context: int, samples: int = 1) -> int:
        """Tokens that each sample of a request may have. asked: None = as many as there is room for.

        Raises RequestError if the prompt does not fit, or more is asked for than is allowed.
        """
        context = min(context, self.max_context_tokens or context)
        if (room := context - prompt) < (asked != 0):
            raise RequestError(
                f"prompt is {prompt:,} tokens; tenant {self.name} has a context of {context:,}, which must "
                "hold one more (shorten the prompt)"
            )
        if asked is None:
            minute = self.tokens_per_minute or math.inf
            left = (minute - prompt) // samples
            return int(max(min(room, self.max_tokens or room, left), 1))
        if self.max_tokens is not None and asked > self.max_tokens:
            raise RequestError(
                f"max_tokens is {asked:,}; tenant {self.name} may have {self.max_tokens:,} (lower max_tokens)"
            )
        return min(asked, room)

    def _may_use(self, kind: str, name: str) -> bool:
        allowed = getattr(self, kind)
        return name in allowed or EVERY in allowed

    def _list(self, kind: str) -> str:
        return ", ".join(getattr(self, kind)) or "none"


LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "max_context_tokens",
    "max_tokens",
)


def check_name(name: object) -> None:
    """Raises RequestError unless this can name a tenant: 1 to 64 letters, digits, dots, dashes."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"name is {shortened(name)}; a tenant's has 1 to 64 letters, digits, dots, dashes or underscores"
        )


class TokenBucket:
    """Room for `per_minute`, which fills up evenly in a minute. Exact: whole numbers, nanoseconds."""

    def __init__(self, per_minute: int, now: int) -> None:
        self.per_minute = per_minute
        self._level = per_minute * MINUTE  # in tokens, times MINUTE
        self._filled_at = now

    def wait(self, count: int, now: int) -> int:
        """Nanoseconds until there is room for so many, which are not more than a minute's."""
        elapsed = max(now - self._filled_at, 0)
        self._level = min(self._level + elapsed * self.per_minute, self.per_minute * MINUTE)
        self._filled_at = max(now, self._filled_at)
        return max(-((self._level - count * MINUTE) // self.per_minute), 0)

    def take(self, count: int) -> None:
        """So many are gone; a negative number gives back."""
        self._level = min(self._level - count * MINUTE, self.per_minute * MINUTE)


@dataclass(eq=False)
class _Account:
    """What a tenant has in flight and has used: the mutable record."""

    in_flight: int = 0
    buckets: dict[str, TokenBucket] = field(default_factory=dict)  # by the limit's name

    def bucket(self, tenant: Tenant, limit: str, now: int) -> TokenBucket | None:
        if (per_minute := getattr(tenant, limit)) is None:
            self.buckets.pop(limit, None)
            return None
        bucket = self.buckets.setdefault(limit, TokenBucket(per_minute, now))
        bucket.per_minute = per_minute  # it may have changed
        return bucket


@dataclass(eq=False)
class Admission:
    """A request that was let in; to be settled once, when it has ended, however it has."""

    _limiter: "Limiter"
    _account: _Account
    _tokens: TokenBucket | None  # where they were charged
    charged: int
    is_settled: bool = False

    def settle(self, used: int) -> None:
        """The request has ended, with so many tokens of prompt and answer; a second time changes nothing."""
        self._limiter._settle(self, used)


class Limiter:
    """Counts what tenants use. May be called from any thread. clock: nanoseconds that never go back."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def admit(self, tenant: Tenant, tokens: int = 0) -> Admission:
        """The request counts against the tenant's limits. tokens: of its prompt, and all it may generate.

        Raises LimitError with the seconds to wait if a limit is reached, RequestError if waiting is no help.
        """
        most = tenant.tokens_per_minute
        if most is not None and tokens > most:
            raise RequestError(
                f"prompt and max_tokens are {tokens:,} tokens; tenant {tenant.name} may use {most:,} "
                "a minute (lower max_tokens)"
            )
        with self._lock:
            account = self._accounts.setdefault(tenant.name, _Account())
            if tenant.concurrent_requests is not None and account.in_flight >= tenant.concurrent_requests:
                raise LimitError(
                    f"tenant {tenant.name} has {account.in_flight:,} requests in flight and may have "
                    f"{tenant.concurrent_requests:,}; wait until one ends",
                    retry_after=1.0,
                )
            bucket = self._charge(tenant, account, tokens)
            account.in_flight += 1
        return Admission(self, account, bucket, tokens)

    def in_flight(self, name: str) -> int:
        """Requests of the tenant that have not been settled."""
        with self._lock:
            return self._accounts[name].in_flight if name in self._accounts else 0

    def _charge(self, tenant: Tenant, account: _Account, tokens: int) -> TokenBucket | None:
        """Both buckets have less; returns that of tokens. Raises LimitError, and nothing is charged."""
        now = self._clock()
        wanted = {"requests_per_minute": 1, "tokens_per_minute": tokens}
        buckets = {limit: account.bucket(tenant, limit, now) for limit in wanted}
        found = {name: b.wait(wanted[name], now) for name, b in buckets.items() if b is not None}
        limit = max(found, key=found.__getitem__, default=None)
        if limit is not None and found[limit] > 0:
            seconds = found[limit] / 1e9
            raise LimitError(
                f"tenant {tenant.name} has used its {getattr(tenant, limit):,} {limit.replace('_', ' ')}; "
                f"try again in {seconds:.3g} s",
                retry_after=seconds,
            )
        for name, bucket in buckets.items():
            if bucket is not None:
                bucket.take(wanted[name])
        return buckets["tokens_per_minute"]

    def _settle(self, admission: Admission, used: int) -> None:
        with self._lock:
            if admission.is_settled:
                return
            admission.is_settled = True
            admission._account.in_flight -= 1
            if admission._tokens is not None:
                admission._tokens.take(used - admission.charged)


def _names(field_name: str, value: object) -> tuple[str, ...]:
    """The list of names as a tuple. Raises RequestError for anything else."""
    if not isinstance(value, tuple | list) or len(value) > MAX_NAMES:
        raise RequestError(f"{field_name} is {shortened(value)}; give a list of at most {MAX_NAMES} names")
    for name in value:
        if not isinstance(name, str) or not _LISTED.fullmatch(name):
            raise RequestError(
                f"{field_name} has {shortened(name)}; a name has 1 to 256 characters and no spaces"
            )
    return tuple(value)


def _check_text(field_name: str, value: object, most: int) -> None:
    if value is None or (isinstance(value, str) and len(value) <= most):
        return
    raise RequestError(f"{field_name} is {shortened(value)}; give a text of at most {most:,} characters")


def shortened(value: object) -> str:
    """The value as a message shows it: of a long one the beginning."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


ANONYMOUS = Tenant("anonymous", adapters=(EVERY,))
"""Everybody, where there are no keys."""
