"""A pretend device that runs a scheduler as the engine does and asserts its laws at every step.

It keeps its own account of what every slot holds, from the plans alone.
"""

import hashlib
from collections import Counter, deque
from dataclasses import dataclass, field

from hypothesis import strategies as st

from realm_jax.config import BLOCK, Buckets, Pool
from realm_jax.params import SamplingParams
from realm_jax.serving.request import FinishReason, Request, Sequence
from realm_jax.serving.scheduler import Decode, Move, Prefill, Scheduler

STOP = 0
CHUNKS = (32, 128, BLOCK)
Shape = tuple[int, int, tuple[int, ...]]
"""What a `Pool` is made of, made only after the drawing: runtime type checks take random numbers."""


@dataclass(frozen=True)
class Arrival:
    """A request, the steps before it comes, and the steps after which its user leaves."""

    wait: int
    prompt: int
    max_tokens: int | None
    n: int
    stop_every: int  # one token in so many is a stop token
    abort_after: int | None


@dataclass(frozen=True)
class Scenario:
    shapes: tuple[Shape, ...]
    context: int
    most_running: int
    arrivals: tuple[Arrival, ...]
    reads_early: tuple[bool, ...]  # whether a call is read at once or after the next one, in turn

    def buckets(self) -> Buckets:
        return Buckets(CHUNKS, tuple(Pool(*shape) for shape in self.shapes), self.most_running)


@st.composite
def pools(draw: st.DrawFn) -> tuple[Shape, ...]:
    capacities = draw(st.sampled_from([(256,), (512,), (256, 512), (256, 1024), (256, 512, 768)]))
    made = []
    for capacity in capacities:
        slots = draw(st.integers(1, 6))
        fewer = draw(st.sets(st.integers(1, slots), max_size=2))
        made.append((capacity, slots, tuple(sorted({*fewer, slots}))))
    return tuple(made)


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    shapes = draw(pools())
    top = shapes[-1][0]
    context = draw(st.integers(max(2, top - 300), top))
    edges = [edge - back for edge in (256, 512, context) for back in (1, 2, 9) if 0 < edge - back < context]
    arrival = st.builds(
        Arrival,
        wait=st.integers(0, 30),
        prompt=st.one_of(st.integers(1, min(40, context - 1)), st.sampled_from(edges or [1])),
        max_tokens=st.one_of(st.none(), st.integers(1, 40)),
        n=st.integers(1, 3),
        stop_every=st.sampled_from([3, 20, 10**9]),
        abort_after=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    )
    arrivals = tuple(draw(st.lists(arrival, min_size=1, max_size=8)))
    most_running = draw(st.sampled_from([1, 3, 5, 100]))
    reads_early = tuple(draw(st.lists(st.booleans(), min_size=1, max_size=5)))
    return Scenario(shapes, context, most_running, arrivals, reads_early)


def script(request: Request, sample: int, context: int, stop_every: int) -> list[int]:
    """What the model says to this sample: all its tokens up to its end, whatever else runs."""
    room = context - len(request.prompt_ids)
    said: list[int] = []
    while len(said) < min(request.params.max_tokens or room, room) and STOP not in said:
        digest = hashlib.blake2b(f"{request.id} {sample} {len(said)}".encode(), digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        said.append(STOP if number % stop_every == 0 else 1 + number % 1000)
    return said


@dataclass
class Slot:
    """A slot of the pretend device: whose tokens it caches, and how many tokens it was asked for."""

    sequence: Sequence
    cached: list[int]
    asked: int = 0


@dataclass
class Simulation:
    """Runs a scenario as the engine would, and asserts every law at every step."""

    scenario: Scenario
    scheduler: Scheduler
    slots: dict[tuple[int, int], Slot] = field(default_factory=dict)
    waiting: deque[Sequence] = field(default_factory=deque)
    in_flight: deque[list[tuple[Sequence, int]]] = field(default_factory=deque)
    scripts: dict[Sequence, list[int]] = field(default_factory=dict)
    ended: Counter[Sequence] = field(default_factory=Counter)
    passed_over: Counter[int] = field(default_factory=Counter)  # decodes of others since a pool is ready
    last_kind: type[Prefill] | type[Decode] | None = None
    calls: int = 0

    @property
    def pools(self) -> tuple[Pool, ...]:
        return self.scheduler.buckets.pools

    def run(self) -> None:
        arrivals = deque(enumerate(self.scenario.arrivals))
        leaving: list[tuple[int, list[Sequence]]] = []
        wait = arrivals[0][1].wait
        while arrivals or self.scheduler.has_work or self.in_flight:
            while arrivals and wait <= 0:
                number, arrival = arrivals.popleft()
                sequences = self.arrive(number, arrival)
                if arrival.abort_after is not None:
                    leaving.append((self.calls + arrival.abort_after, sequences))
                wait = arrivals[0][1].wait if arrivals else 0
            wait -= 1
            for when, sequences in leaving:
                if when <= self.calls:
                    self.leave(sequences)
            self.step()
            assert self.calls <= self.most_calls(), "some sequence starves"
            unfinished = any(sequence.finish_reason is None for sequence in self.scripts)
            assert self.scheduler.has_work == unfinished
        assert set(self.ended) == set(self.scripts)
        assert set(self.ended.values()) == {1}
        held = [sequence for pool in self.scheduler._slots for sequence in pool if sequence is not None]
        assert not held, "a slot leaked"
        for sequence, said in self.scripts.items():
            if sequence.finish_reason is FinishReason.ABORT:
                assert sequence.token_ids == said[: len(sequence.token_ids)]
            else:
                assert sequence.token_ids == said
                assert (sequence.finish_reason is FinishReason.STOP) == (said[-1] == STOP)

    def arrive(self, number: int, arrival: Arrival) -> list[Sequence]:
        params = SamplingParams(max_tokens=arrival.max_tokens, n=arrival.n)
        request = Request(str(number), tuple(range(arrival.prompt)), params, seed=0)
        sequences = self.scheduler.add(request)
        assert [sequence.sample_index for sequence in sequences] == list(range(arrival.n))
        self.waiting.extend(sequences)
        for s in sequences:
            self.scripts[s] = script(request, s.sample_index, self.scenario.context, arrival.stop_every)
        return sequences

    def leave(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            if sequence.finish_reason is None:
                self.scheduler.finish(sequence, FinishReason.ABORT)
                self.end(sequence)

    def end(self, sequence: Sequence) -> None:
        self.ended[sequence] += 1
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self.slots = {at: slot for at, slot in self.slots.items() if slot.sequence is not sequence}

    def step(self) -> None:
        ready, can_prefill, can_move = self.ready(), self.can_prefill(), self.can_move()
        plan = self.scheduler.schedule()
        self.calls += 1
        match plan:
            case Prefill():
                assert not (self.last_kind is Prefill and ready), "decoding sequences wait for a second chunk"
                self.prefill(plan)
            case Decode():
                assert not (self.last_kind is Decode and can_prefill), "a prompt waits for a second step"
                self.decode(plan, ready)
            case Move():
                assert can_move
                self.move(plan)
            case None:
                assert not (ready or can_prefill or can_move), "idle although something could run"
                assert self.in_flight or not self.scheduler.has_work, "waits for nothing"
        if isinstance(plan, Prefill | Decode):
            self.last_kind = type(plan)
        early = self.scenario.reads_early[self.calls % len(self.scenario.reads_early)]
        if self.in_flight and (plan is None or early or len(self.in_flight) > 1):
            self.read()

    def read(self) -> None:
        for sequence, token in self.in_flight.popleft():
            had_ended = sequence.finish_reason is not None
            taken = self.scheduler.commit(sequence, [token], {STOP})
            assert taken == ([] if had_ended else [token])
            if sequence.finish_reason is not None and not had_ended:
                self.end(sequence)

    def ready(self) -> set[tuple[int, int]]:
        """Slots whose sequence could take a step."""
        return {
            (pool, slot)
            for (pool, slot), held in self.slots.items()
            if self.wants_step(held) and len(held.cached) < self.pools[pool].capacity
        }

    def wants_step(self, held: Slot) -> bool:
        sequence = held.sequence
        room = self.scenario.context - sequence.prompt_length
        return 0 < held.asked < min(sequence.request.params.max_tokens or room, room)

    def can_prefill(self) -> bool:
        if any(not held.asked for held in self.slots.values()):
            return True
        return bool(self.waiting) and self.place_of(self.waiting[0]) is not None

    def place_of(self, sequence: Sequence) -> tuple[int, int] | None:
        """The lowest free slot of the smallest pool that fits the prompt and a token, if one more may run."""
        if len(self.slots) >= self.scenario.most_running:
            return None
        for pool, shape in enumerate(self.pools):
            for slot in range(shape.slots):
                if shape.capacity > sequence.prompt_length and (pool, slot) not in self.slots:
                    return pool, slot
        return None

    def can_move(self) -> bool:
        """Whether a sequence has filled its slot and the next pool has room."""
        return any(
            self.has_filled(pool, held) and self.free_slots(pool + 1)
            for (pool, _), held in self.slots.items()
        )

    def has_filled(self, pool: int, held: Slot) -> bool:
        return self.wants_step(held) and len(held.cached) == self.pools[pool].capacity

    def free_slots(self, pool: int) -> list[int]:
        return [i for i in range(self.pools[pool].slots) if (pool, i) not in self.slots]

    def prefill(self, plan: Prefill) -> None:
        at, prompt = (plan.pool, plan.slot), plan.sequence.request.prompt_ids
        if plan.start == 0:
            assert self.waiting and self.waiting[0] is plan.sequence, "not in order of arrival"
            assert at == self.place_of(plan.sequence)
            self.waiting.popleft()
            self.slots[at] = Slot(plan.sequence, [])
        held = self.slots.get(at)
        assert held is not None and held.sequence is plan.sequence, "a chunk of a sequence that ended"
        assert plan.start == len(held.cached), "chunks do not follow one another"
        assert plan.start % BLOCK == 0, "a boundary that depends on more than the prompt"
        assert plan.tokens == prompt[plan.start : plan.start + BLOCK]
        assert plan.bucket == min(chunk for chunk in CHUNKS if chunk >= len(plan.tokens))
        held.cached.extend(plan.tokens)
        assert len(held.cached) <= self.pools[plan.pool].capacity
        assert plan.is_last == (len(held.cached) == len(prompt))
        if plan.is_last:
            self.dispatch([held])

    def decode(self, plan: Decode, ready: set[tuple[int, int]]) -> None:
        pool = self.pools[plan.pool]
        mine = {slot for at, slot in ready if at == plan.pool}
        assert mine == {slot for slot, sequence in enumerate(plan.sequences) if sequence is not None}
        assert plan.rows == len(plan.sequences) == min(rows for rows in pool.rows if rows > max(mine))
        held = [self.slots[plan.pool, slot] for slot in sorted(mine)]
        assert [h.sequence for h in held] == [s for s in plan.sequences if s is not None]
        for h in held:
            newest = self.scripts[h.sequence]
            h.cached.append(newest[min(h.asked, len(newest)) - 1])
            assert len(h.cached) <= pool.capacity, "the device would write past the slot"
        others = {at for at, _ in ready} - {plan.pool}
        self.passed_over = Counter({other: self.passed_over[other] + 1 for other in others})
        assert all(times < len(self.pools) for times in self.passed_over.values()), "a pool starves"
        self.dispatch(held)

    def dispatch(self, held: list[Slot]) -> None:
        """Each of these is asked for its next token; past a stop the device says anything."""
        call = []
        for h in held:
            said = self.scripts[h.sequence]
            call.append((h.sequence, said[h.asked] if h.asked < len(said) else 999))
            h.asked += 1
        self.in_flight.append(call)
        assert len(self.in_flight) <= 2

    def move(self, plan: Move) -> None:
        source, target = (plan.from_pool, plan.from_slot), (plan.to_pool, plan.to_slot)
        assert self.has_filled(plan.from_pool, self.slots[source])
        assert plan.to_pool == plan.from_pool + 1
        assert plan.to_slot == min(self.free_slots(plan.to_pool))
        self.slots[target] = self.slots.pop(source)

    def most_calls(self) -> int:
        """Each call begins a chunk, advances a sequence, moves one, or waits for one of these to be read."""
        work = sum(-(-s.prompt_length // BLOCK) + len(said) + 4 for s, said in self.scripts.items())
        return 2 * work + 31 * len(self.scenario.arrivals)
