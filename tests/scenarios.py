"""Random scenarios for a scheduler: pools, prompts that begin alike, users who leave, memory that is lost."""

import hashlib
from dataclasses import dataclass
from enum import StrEnum

from hypothesis import strategies as st

from realm_jax.buckets import Buckets, Pool
from realm_jax.params import SamplingParams
from realm_jax.serving.request import Request

STOP = 0
Owner = tuple[str, tuple[tuple[str, float], ...]]
ADAPTERS = (("x", 1.0),), (("x", 0.5),), (("y", 1.0),), (("y", 1.0), ("z", -1.0)), (("x", 1.0), ("x", 1.0))
OWNERS: list[Owner] = [("", ()), ("", ()), ("", ()), *(("", each) for each in ADAPTERS), ("tenant", ())]
MAX_LORAS = 2
"""Fewer than there are adapters, and enough for each request."""

Shape = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""What a `Pool` is made of, made only after the drawing: runtime type checks take random numbers."""


class Before(StrEnum):
    """How a prompt begins, if as that of the request that came before."""

    PROMPT = "prompt"  # the whole prompt is the same
    TEXT = "text"  # prompt and answer, then more


@dataclass(frozen=True)
class Arrival:
    """A request, the steps before it comes, and those after which its user leaves."""

    wait: int  # or until all that came before has ended
    header: int  # the prompt's first `shared` tokens are those of one of a few headers
    shared: int
    length: int  # where it is not positive, so much less than the scenario's edge
    before: Before | None
    changed: int | None  # at this place stands another token
    max_tokens: int | None
    score_from: int | None  # None: no log-probabilities of the prompt
    n: int
    owner: Owner
    priority: int
    stop_every: int  # one token in so many is a stop token
    abort_after: int | None


@dataclass(frozen=True)
class Scenario:
    """Everything that happens to a scheduler from outside."""

    shapes: tuple[Shape, ...]
    unused: int  # by so much the context is shorter than the largest slot
    edge: int  # a length of prompts at which, a token earlier or later, something else happens
    max_num_seqs: int
    max_queue: int | None
    prefix_caching: bool
    arrivals: tuple[Arrival, ...]
    loses_before: int | None  # before this arrival the device's memory is lost
    reads_early: tuple[bool, ...]  # whether a call is read at once or after the next one, in turn

    @property
    def context(self) -> int:
        return max(self.shapes[-1][0] - self.unused, 2)

    def buckets(self) -> Buckets:
        return Buckets(tuple(Pool(*shape) for shape in self.shapes), self.max_num_seqs)

    def requests(self) -> list[Request]:
        """What each arrival asks for."""
        made: list[Request] = []
        owner = OWNERS[0]
        for number, arrival in enumerate(self.arrivals):
            if not made or arrival.before is None:
                owner = arrival.owner
            params = SamplingParams(
                max_tokens=arrival.max_tokens,
                n=arrival.n,
                prompt_logprobs=None if arrival.score_from is None else 0,
            )
            request = Request(
                str(number),
                self._prompt(number, made),
                params,
                seed=0,
                priority=arrival.priority,
                score_from=1 if arrival.score_from is None else arrival.score_from,
                tenant=owner[0],
                adapters=owner[1],
            )
            made.append(request)
        return made

    def _prompt(self, number: int, before: list[Request]) -> tuple[int, ...]:
        arrival = self.arrivals[number]
        length = arrival.length if arrival.length > 0 else self.edge + arrival.length
        ids = [10_000 * (arrival.header + 1) + i for i in range(min(arrival.shared, length))]
        ids += [10_000 * (number + 10) + i for i in range(length - arrival.shared)]
        if before and arrival.before is Before.PROMPT:
            ids = list(before[-1].prompt_ids)
        if before and arrival.before is Before.TEXT:
            ids = [*before[-1].prompt_ids, *self.script(before[-1], 0), *ids]
        if arrival.changed is not None and arrival.changed < len(ids):
            ids[arrival.changed] = 10_000 * (number + 10) + 9_999
        return tuple(ids[: self.context - (arrival.max_tokens != 0)])

    def script(self, request: Request, sample: int) -> list[int]:
        """What the model says to this sample: all its tokens up to its end, whatever else runs."""
        room = self.context - len(request.prompt_ids)
        most = room if request.params.max_tokens is None else min(request.params.max_tokens, room)
        stop_every = self.arrivals[int(request.id)].stop_every
        said: list[int] = []
        while len(said) < most and STOP not in said:
            digest = hashlib.blake2b(f"{request.id} {sample} {len(said)}".encode(), digest_size=8).digest()
            number = int.from_bytes(digest, "little")
            said.append(STOP if number % stop_every == 0 else 1 + number % 1000)
        return said


ARRIVALS = st.builds(
    Arrival,
    wait=st.sampled_from([0, 0, 0, 0, 1, 2, 5, 10, 30, 999, 999]),
    header=st.integers(0, 1),
    shared=st.sampled_from([0, 63, 64, 65, 100, 128, 129, 200, 256, 400]),
    length=st.one_of(st.integers(1, 300), st.sampled_from([0, 0, -1, -2, -9])),
    before=st.sampled_from([None, None, Before.PROMPT, Before.TEXT]),
    changed=st.sampled_from([*[None] * 8, 0, 1, 63, 64, 100, 127, 128, 192]),
    max_tokens=st.sampled_from([None, 0, 0, 1, 2, 5, 10, 20, 70, 70]),
    score_from=st.sampled_from([*[None] * 9, 0, 1, 2, 64, 65, 66, 128, 129, 1000]),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    owner=st.sampled_from(OWNERS),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    stop_every=st.sampled_from([10**9, 10**9, 20, 3]),
    abort_after=st.sampled_from([*[None] * 12, 0, 1, 2, 3, 5, 10, 30]),
)
CAPACITIES = st.sampled_from([(256,), (512,), (256, 512), (256, 1024), (256, 512, 768)])
SLOTS = st.sampled_from([1, 2, 3, 4, 6])
ROWS = st.sets(SLOTS, max_size=2)
TILES = st.sets(st.sampled_from([8, 1, 4, 2, 3]), min_size=1, max_size=3)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[Shape, ...]:
    made = []
    for capacity in draw(CAPACITIES):
        slots = draw(SLOTS)
        fewer = {rows for rows in draw(ROWS) if rows < slots}
        made.append((capacity, slots, (*sorted(fewer), slots), tuple(sorted(draw(TILES)))))
    return tuple(made)


SCENARIOS = st.builds(
    Scenario,
    shapes=shapes(),
    unused=st.integers(0, 300),
    edge=st.sampled_from([256, 256, 64, 128, 192, 320, 512]),
    max_num_seqs=st.sampled_from([100, 1, 3, 5]),
    max_queue=st.sampled_from([None, None, 1, 2, 4]),
    prefix_caching=st.sampled_from([True, True, True, False]),
    arrivals=st.lists(ARRIVALS, min_size=1, max_size=12).map(tuple),
    loses_before=st.sampled_from([None, None, None, 1, 2, 4]),
    reads_early=st.lists(st.booleans(), min_size=1, max_size=5).map(tuple),
)
