"""A request, its life as sequences, and what comes out. Plain Python: no JAX."""

import itertools
import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, TypedDict

from realm_jax.config import TILE
from realm_jax.errors import RequestError
from realm_jax.params import SamplingParams
from realm_jax.serving.drafting import DraftRecord

if TYPE_CHECKING:
    from realm_jax.grammars import Matcher


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the context's end
    ABORT = "abort"
    TIMEOUT = "timeout"  # the request's own
    ERROR = "error"  # its grammar came to a dead end, or took more than one may: the text is cut


class TokenLogprob(TypedDict):
    """A token's natural-log probability, and the best alternatives as [token_id, logprob]."""

    token_id: int
    logprob: float
    top: list[list[int | float]]


class PromptLogprob(TokenLogprob):
    """A prompt token's, given those before it; is_greedy: whether no other token is likelier."""

    is_greedy: bool


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it. A seed is always set here: None was drawn before.

    priority: a smaller one is let in first (vLLM's meaning). timeout: seconds from its arrival after which
    it ends with what it has. score_from: the first prompt token whose log-probability is wanted, where
    `params.prompt_logprobs` asks for them. adapters: names, and what each one's change is multiplied by.
    tenant, adapters, cache_salt: what is computed of prompts is shared only where all agree. weight: the
    tenant's share of the engine is to the others' as this, where they wait, too. embeds: the output has the
    prompt's embedding.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    priority: int = 0
    timeout: float | None = None
    score_from: int = 1
    tenant: str = ""
    weight: float = 1.0
    adapters: tuple[tuple[str, float], ...] = ()
    cache_salt: str = ""
    embeds: bool = False
    arrival: float = field(default_factory=time.perf_counter)

    @property
    def owner(self) -> tuple[str, str, tuple[tuple[str, float], ...]]:
        return self.tenant, self.cache_salt, self.adapters

    @property
    def adapter_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.adapters)

    @property
    def reusable(self) -> int:
        """Leading prompt tokens that need not be computed if they were before: what follows is needed."""
        last = 0 if self.embeds else len(self.prompt_ids) - 1
        return last if self.params.prompt_logprobs is None else min(last, max(self.score_from - 1, 0))


MAX_SCALE = 10**30

Adapters = str | Rows[tuple[str, float]] | None
"""What a caller says of adapters: none, one by name, or several with what each is multiplied by."""


def chosen_adapters(given: object) -> tuple[tuple[str, float], ...]:
    """`Adapters`, as a request has them; pairs may be lists. Raises RequestError for anything else."""
    if given is None:
        return ()
    if isinstance(given, str):
        return ((given, 1.0),)
    if isinstance(given, Rows) and all(is_scaled_adapter(each) for each in given):
        return tuple((name, checked_scale(name, scale)) for name, scale in given)
    raise RequestError(f"lora is {given!r}; it must be an adapter's name, or a list of names and scales")


def checked_scale(adapter: object, scale: float) -> float:
    """The scale, which float32 can hold. Raises RequestError otherwise."""
    if not -MAX_SCALE <= scale <= MAX_SCALE:
        raise RequestError(
            f"the scale of adapter {str(adapter)!r} is {str(scale)[:20]}; give one from -1e30 to 1e30"
        )
    return float(scale)


def is_scaled_adapter(each: object) -> bool:
    """Whether this is a name and a scale."""
    if not isinstance(each, tuple | list) or len(each) != 2:
        return False
    name, scale = each
    return isinstance(name, str) and isinstance(scale, int | float) and not isinstance(scale, bool)


def each_adapters(given: Adapters | Rows[Adapters], count: int) -> list[tuple[tuple[str, float], ...]]:
    """What each of `count` prompts runs with: the same for all, or one entry each."""
    if given is None or isinstance(given, str) or (given and all(is_scaled_adapter(each) for each in given)):
        return [chosen_adapters(given)] * count  # pyright: ignore[reportArgumentType]: not one each
    if len(given) != count:
        raise RequestError(f"lora has {len(given)} entries for {count} prompts; give one, or one each")
    return [chosen_adapters(each) for each in given]  # pyright: ignore[reportArgumentType]: one each


def leaders_first(requests: Rows[Request], slots: int) -> list[Request]:
    """One request of each group that shares all its reusable tiles, before the others of these groups.

    What the first computes is there when the others come; few groups at a time, because it stays in the
    slots only until these are taken.
    """
    groups: dict[tuple[int, ...], list[Request]] = {}
    for request in requests:
        shared = request.prompt_ids[: request.reusable // TILE * TILE]
        groups.setdefault(shared, []).append(request)
    ordered, at_a_time = [groups[shared] for shared in sorted(groups)], max(slots // 2, 1)
    some = [ordered[i : i + at_a_time] for i in range(0, len(ordered), at_a_time)]
    return [r for part in some for r in [*(g[0] for g in part), *(r for g in part for r in g[1:])]]


@dataclass(frozen=True)
class Usage:
    """Tokens in and out."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, reused from earlier ones


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds since the request arrived."""

    first_token_s: float | None
    finished_s: float
    drafts: "DraftMetrics | None" = None  # None where nothing guesses


@dataclass(frozen=True)
class DraftMetrics:
    """What became of guessed tokens.

    drafted: guesses that were verified, in `steps` steps. by_position: by how far a guess was from the
    newest token, how many were verified, and how many of them accepted.
    """

    steps: int
    drafted: int
    accepted: int
    by_position: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, record: DraftRecord) -> "DraftMetrics":
        """The metrics as they stand."""
        positions = tuple((tried, right) for tried, right in record.positions)
        return cls(record.steps, record.drafted, record.accepted, positions)

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens of a step with guesses, the one that follows them included; None without such a step."""
        return 1 + self.accepted / self.steps if self.steps else None

    def since(self, before: "DraftMetrics") -> "DraftMetrics":
        """What came after, if these are the same run's."""
        old = itertools.chain(before.by_position, itertools.repeat((0, 0)))
        positions = tuple((a - c, b - d) for (a, b), (c, d) in zip(self.by_position, old, strict=False))
        counts = self.steps - before.steps, self.drafted - before.drafted, self.accepted - before.accepted
        return DraftMetrics(*counts, positions)

    def json(self) -> dict[str, object]:
        """The metrics as one JSON object."""
        return {
            "steps": self.steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "by_position": [list(each) for each in self.by_position],
            "mean_accepted_length": self.mean_accepted_length,
        }


@dataclass(frozen=True)
class GenerationOutput:
    """One finished sample of a request.

    embedding: the mean of the prompt's last hidden states, of length 1; None where not wanted, or the
    sequence ended before its prompt was computed.
    """

    request_id: str
    sample_index: int
    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    prompt_logprobs: list[PromptLogprob | None] | None  # None where not wanted, or nothing stands before
    finish_reason: FinishReason
    seed: int
    usage: Usage
    metrics: RequestMetrics
    embedding: list[float] | None = None


@dataclass(frozen=True)
class TextDelta:
    """What one step added to a sample; `output` is set with the last one.

    logprobs: of these tokens, None where not wanted.
    """

    request_id: str
    sample_index: int
    text: str
    token_ids: list[int]
    output: GenerationOutput | None = None
    logprobs: list[TokenLogprob] | None = None


@dataclass(eq=False)
class Sequence:
    """One sample of a request in flight: the mutable record.

    Tokens are read one step late: `dispatched` counts those that the device may have made, `token_ids` holds
    those that have been read.
    """

    request: Request
    sample_index: int
    max_new_tokens: int
    pool: int | None = None
    slot: int | None = None
    prefilled: int = 0
    reused: int = 0  # of these, not computed for this sequence
    bank_slots: tuple[int, ...] = ()  # of its adapters, while it has a slot
    dispatched: int = 0
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    first_token_at: float | None = None
    drafts: DraftRecord | None = None  # of its guesses, where something guesses
    matcher: "Matcher | None" = None  # of the form that its answer must have

    @property
    def awaits_mask(self) -> bool:
        """Whether what may come next is known only when all that was dispatched has been read."""
        return self.matcher is not None and self.dispatched > len(self.token_ids)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def is_prefilled(self) -> bool:
        return self.prefilled == self.prompt_length

    @property
    def tiles_left(self) -> int:
        """Tiles of the prompt that have not been dispatched."""
        return -(-(self.prompt_length - self.prefilled) // TILE)

    @property
    def cached(self) -> int:
        """Tokens in the cache at most, once all that was dispatched has run: the newest is not yet."""
        return self.prefilled + max(self.dispatched - 1, 0)

    @property
    def wants_step(self) -> bool:
        """Whether it still lacks tokens, all dispatched ones counted."""
        return self.finish_reason is None and self.is_prefilled and self.dispatched < self.max_new_tokens
