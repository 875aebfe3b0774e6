"""Runs a scheduler on a pretend device as the engine does, and asserts its laws at every step."""

import bisect
from collections import Counter, deque
from dataclasses import dataclass, field

from pretend_device import Call, Device
from scenarios import MAX_LORAS, STOP, Arrival, Scenario

from realm_jax.config import TILE
from realm_jax.errors import CapacityError, RequestError
from realm_jax.serving.adapters import LoadAdapter
from realm_jax.serving.plans import Copy, Decode, Plan, Prefill
from realm_jax.serving.request import FinishReason, Request, Sequence
from realm_jax.serving.scheduler import Scheduler


def scheduler_of(scenario: Scenario, kind: type[Scheduler] = Scheduler) -> Scheduler:
    return kind(
        scenario.buckets(),
        scenario.context,
        max_queue=scenario.max_queue,
        max_loras=MAX_LORAS,
        prefix_caching=scenario.prefix_caching,
    )


@dataclass
class Simulation:
    """Everything that happens in a scenario, from the first arrival to the last end."""

    scenario: Scenario
    scheduler: Scheduler
    device: Device = field(init=False)
    queue: list[Sequence] = field(default_factory=list)  # by rank
    rank: dict[Sequence, tuple[int, int]] = field(default_factory=dict)
    scripts: dict[Sequence, list[int]] = field(default_factory=dict)
    in_flight: deque[Call] = field(default_factory=deque)
    ended: Counter[Sequence] = field(default_factory=Counter)
    passed_over: Counter[int] = field(default_factory=Counter)  # decodes of others since a pool is ready
    last_kind: type[Prefill] | type[Decode] | None = None
    copies_in_a_row: int = 0
    calls: int = 0
    most_calls: int = field(init=False)  # that it can take, if each does something or waits for an arrival

    def __post_init__(self) -> None:
        self.device = Device(self.scenario)
        self.most_calls = sum(arrival.wait + 1 for arrival in self.scenario.arrivals)

    def run(self) -> None:
        arrivals = deque(zip(self.scenario.arrivals, self.scenario.requests(), strict=True))
        leaving: list[tuple[int, list[Sequence]]] = []
        wait = arrivals[0][0].wait
        while arrivals or self.scheduler.has_work or self.in_flight:
            while arrivals and wait <= 0:
                if len(self.scenario.arrivals) - len(arrivals) == self.scenario.loses_before:
                    self.lose()
                arrival, request = arrivals.popleft()
                sequences = self.arrive(arrival, request)
                if arrival.abort_after is not None:
                    leaving.append((self.calls + arrival.abort_after, sequences))
                wait = arrivals[0][0].wait if arrivals else 0
            wait = wait - 1 if self.scheduler.has_work or self.in_flight else 0
            for when, sequences in leaving:
                if self.calls in (when, when + 1, when + 9):
                    self.leave(sequences)
            self.step()
            assert self.calls <= self.most_calls, "some sequence starves"
            assert self.scheduler.has_work == (len(self.ended) < len(self.scripts))
        self.check_ends()

    def check_ends(self) -> None:
        assert self.ended == Counter(dict.fromkeys(self.scripts, 1))
        assert not list(self.scheduler.slots.taken()), "a slot leaked"
        for sequence, said in self.scripts.items():
            if sequence.finish_reason is FinishReason.ABORT:
                assert sequence.token_ids == said[: len(sequence.token_ids)]
            else:
                assert sequence.token_ids == said
                assert (sequence.finish_reason is FinishReason.STOP) == (STOP in said)

    def arrive(self, arrival: Arrival, request: Request) -> list[Sequence]:
        """The request waits, unless more would wait than may, those left out that could run at once."""
        most, running = self.scenario.max_queue, len(self.device.running)
        room = max(self.scenario.max_num_seqs - running, 0)
        fits = most is None or len(self.queue) + arrival.n <= most + room
        waiting = Counter(sequence.request.tenant for sequence in self.queue)
        if most is not None and arrival.n + waiting[request.tenant] <= most / len({*waiting, request.tenant}):
            fits = True  # however many of others wait
        try:
            sequences = self.scheduler.add(request)
        except (CapacityError, RequestError) as error:
            assert not fits, "refused although there is room in the queue"
            never = most is not None and arrival.n > most + self.scenario.max_num_seqs
            assert isinstance(error, RequestError) == never, "waiting would not help, or would"
            return []
        assert fits, "more wait than may"
        assert [sequence.sample_index for sequence in sequences] == list(range(arrival.n))
        for sequence in sequences:
            self.rank[sequence] = (arrival.priority, len(self.rank))
            bisect.insort(self.queue, sequence, key=self.rank.__getitem__)
            said = self.scripts[sequence] = self.scenario.script(request, sequence.sample_index)
            self.most_calls += 2 * (-(-sequence.prompt_length // TILE) + len(said) + 6)
        return sequences

    def leave(self, sequences: list[Sequence]) -> None:
        """All of these end; those that ended before stay as they are, however often this is asked."""
        for sequence in sequences:
            reason = sequence.finish_reason
            self.scheduler.finish(sequence, FinishReason.ABORT)
            assert sequence.finish_reason is (reason or FinishReason.ABORT)
            if reason is None:
                self.end(sequence)

    def lose(self) -> None:
        """As the engine does after a call that failed: nothing stands anywhere, and all end."""
        self.scheduler.forget()
        self.device.forget()
        self.in_flight.clear()
        self.leave(list(self.scripts))
        self.scheduler.forget()

    def end(self, sequence: Sequence) -> None:
        self.ended[sequence] += 1
        self.device.release(sequence)
        if sequence in self.queue:
            self.queue.remove(sequence)
        assert self.scheduler.num_waiting == len(self.queue)

    def step(self) -> None:
        """The scheduler's next plan has run, and a call may have been read."""
        ready, movers = self.device.ready(), self.device.movers()
        can_prefill = bool(self.device.pending) or self.can_admit()
        plan = self.scheduler.schedule()
        self.calls += 1
        has_admitted = self.admit(plan)
        while isinstance(plan, LoadAdapter):
            self.device.load(plan)
            plan = self.scheduler.schedule()
        assert not movers or (isinstance(plan, Copy) and not has_admitted), "a filled slot keeps its sequence"
        match plan:
            case Prefill():
                assert not (self.last_kind is Prefill and ready), "decoding sequences wait for a second call"
                self.prefill(plan)
            case Decode():
                assert not (self.last_kind is Decode and can_prefill), "a prompt waits for a second step"
                self.in_flight.append(self.device.decode(plan))
                others = {pool for pool, _ in ready} - {plan.pool}
                self.passed_over = Counter({other: self.passed_over[other] + 1 for other in others})
                most = len(self.device.pools) - 1
                assert all(n <= most for n in self.passed_over.values()), "a pool starves"
            case Copy() if not has_admitted:
                self.move(plan)
            case None:
                assert not (ready or can_prefill or movers), "idle although something could run"
                assert self.in_flight or not self.scheduler.has_work, "waits for nothing"
        self.take_turns(plan)
        early = self.scenario.reads_early[self.calls % len(self.scenario.reads_early)]
        if self.in_flight and (plan is None or early or len(self.in_flight) > 1):
            self.read()

    def take_turns(self, plan: Plan | None) -> None:
        if isinstance(plan, Prefill | Decode):
            self.last_kind = type(plan)
        self.copies_in_a_row = self.copies_in_a_row + 1 if isinstance(plan, Copy) else 0
        most = self.device.most_tiles + sum(pool.slots for pool in self.device.pools)
        assert self.copies_in_a_row <= most, "copies keep all others waiting"

    def prefill(self, plan: Prefill) -> None:
        call = self.device.prefill(plan)
        if call or any(tile.sequence.request.params.prompt_logprobs is not None for tile in plan.tiles):
            self.in_flight.append(call)

    def move(self, plan: Copy) -> None:
        is_kept = plan.from_pool == plan.to_pool  # what stood where a sequence moves
        move = self.scheduler.schedule() if is_kept else plan
        assert isinstance(move, Copy), "a slot is cleared for nobody"
        self.device.move(move, plan if is_kept else None)

    def can_admit(self) -> bool:
        """Whether the first that waits may run, and there is not yet work for a whole call."""
        candidates = list(self.scheduler.queue.candidates())
        slots = min(sum(pool.slots for pool in self.device.pools), self.scenario.max_num_seqs)
        if len({each.request.tenant for each in self.scripts}) == 1 and len(self.device.running) < slots:
            assert candidates == self.queue[:1], "one tenant has all slots, and its own order"
        return any(self.fits(sequence) for sequence in candidates)

    def fits(self, sequence: Sequence) -> bool:
        """Whether it could run, and there is not yet work for a whole call."""
        if self.device.pool_for(sequence) is None or not self.device.has_bank_for(sequence):
            return False
        return self.device.tiles_left() < self.device.most_tiles

    def admit(self, plan: Plan | None) -> bool:
        """All that the scheduler let in hold slots of the device, too; whether there were any."""
        admitted = [sequence for sequence in self.queue if sequence.slot is not None]
        admitted.sort(key=lambda sequence: getattr(self.scheduler._slot_of(sequence), "used", 0))
        for sequence in admitted:
            mine = [each for each in self.queue if each.request.tenant == sequence.request.tenant]
            assert sequence is mine[0], "not by priority, then arrival"
            assert self.fits(sequence), "let in before its tiles are wanted"
            is_copied = isinstance(plan, Copy) and sequence is admitted[-1]
            copies = self.device.enter(sequence, self.scripts[sequence], plan if is_copied else None)
            assert all(self.scheduler.schedule() == copy for copy in copies), "a copy does not come"
            self.queue.remove(sequence)
        assert isinstance(plan, Copy) or not self.can_admit(), "waits although it could run"
        return bool(admitted)

    def read(self) -> None:
        """The oldest call's tokens are known; a prompt that only is scored ends with its last tile."""
        for sequence, token in self.in_flight.popleft():
            had_ended = sequence.finish_reason is not None
            wanted = [] if had_ended or sequence.request.params.max_tokens == 0 else [token]
            assert self.scheduler.commit(sequence, [token], {STOP}) == wanted
            if not had_ended:
                is_over = len(sequence.token_ids) == len(self.scripts[sequence])
                assert (sequence.finish_reason is not None) == is_over, "ends too early, or goes on"
                if is_over:
                    self.end(sequence)
