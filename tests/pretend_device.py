"""A pretend device with its own account of what every slot holds; each plan it runs must keep the laws.

It believes nothing of the scheduler: where a sequence says it was placed, and what it says it reused, is
compared with this account.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from scenarios import MAX_LORAS, Owner, Scenario

from realm_jax.config import TILE
from realm_jax.serving.adapters import LoadAdapter
from realm_jax.serving.plans import Copy, Decode, Plan, Prefill, Tile
from realm_jax.serving.request import Request, Sequence

Place = tuple[int, int]  # a pool and a slot of it
Call = list[tuple[Sequence, int]]  # what the device will say, and to whom


@dataclass
class Memory:
    """What stands in a slot: tokens, of whom, and how many of the first were computed as a prompt's."""

    owner: Owner | None = None
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    used: int = 0  # when what stands here was last used

    @property
    def worth(self) -> tuple[bool, int]:
        """The least is lost first: nothing that can be reused, then what was used longest ago."""
        return self.computed >= TILE, self.used

    def is_start_of(self, request: Request) -> bool:
        """Whether nothing that can be reused stands here but what this prompt will have computed anyway."""
        tokens = self.tokens[: self.computed // TILE * TILE]
        is_same = self.owner == (request.tenant, request.adapters)
        return not tokens or (is_same and tuple(tokens) == request.prompt_ids[: len(tokens)])

    def reusable(self, request: Request) -> int:
        """Tokens of whole tiles that stand here and need not be computed again for this request."""
        prompt = request.prompt_ids
        if self.owner != (request.tenant, request.adapters):
            return 0
        most = min(self.computed, len(prompt) - 1)
        if request.params.prompt_logprobs is not None:
            most = min(most, max(request.score_from - 1, 0))
        same = next((i for i in range(most) if self.tokens[i] != prompt[i]), most)
        return same // TILE * TILE

    def keep(self, owner: Owner | None, tokens: int) -> None:
        """Only the first tokens can be relied on."""
        self.owner = owner
        del self.tokens[tokens:]
        self.computed = min(self.computed, tokens)


@dataclass(eq=False)
class Running:
    """A sequence in a slot."""

    sequence: Sequence
    at: Place
    said: list[int]  # all that the model will say to it
    wanted: int  # tokens that it may have, if none of them ends it
    since: int  # when it took this slot
    asked: int = 0  # tokens that the device was asked for
    filled: int | None = None  # when it could go no further in this slot

    @property
    def wants_step(self) -> bool:
        return 0 < self.asked < self.wanted

    def ask(self) -> tuple[Sequence, int]:
        """What the device will say; past a stop, or where nothing is wanted, anything."""
        token = self.said[self.asked] if self.asked < len(self.said) else 999
        self.asked = min(self.asked + 1, self.wanted)
        return self.sequence, token


class Device:
    """The slots of all pools, and who runs in them."""

    def __init__(self, scenario: Scenario) -> None:
        self.pools = scenario.buckets().pools
        self.context = scenario.context
        self.max_num_seqs = scenario.max_num_seqs
        self.prefix_caching = scenario.prefix_caching
        self.memory: defaultdict[Place, Memory] = defaultdict(Memory)
        self.running: dict[Place, Running] = {}
        self.pending: list[Running] = []  # whose prompt is not yet computed, by admission
        self.clock = 0
        self.bank: dict[int, str] = {}  # adapters by slot

    @property
    def most_tiles(self) -> int:
        return max(max(pool.tiles) for pool in self.pools)

    def tiles_left(self, pool: int | None = None) -> int:
        """Tiles of all prompts, or of a pool's, that are not yet computed."""
        pending = [r for r in self.pending if pool is None or r.at[0] == pool]
        return sum(-(-(r.sequence.prompt_length - len(self.memory[r.at].tokens)) // TILE) for r in pending)

    def free(self, pool: int) -> list[int]:
        """Free slots of the lowest rows that a step may compute."""
        free = [slot for slot in range(self.pools[pool].slots) if (pool, slot) not in self.running]
        rows = min((rows for rows in self.pools[pool].rows if free and rows > free[0]), default=0)
        return [slot for slot in free if slot < rows]

    def pool_for(self, sequence: Sequence) -> int | None:
        """The smallest pool with room that fits the prompt and, if one is wanted, a token more."""
        if len(self.running) >= self.max_num_seqs:
            return None
        needed = sequence.prompt_length + (sequence.request.params.max_tokens != 0)
        fitting = (i for i, pool in enumerate(self.pools) if pool.capacity >= needed)
        return next((i for i in fitting if self.free(i)), None)

    def adapters_in_use(self) -> set[str]:
        return {name for r in self.running.values() for name, _ in r.sequence.request.adapters}

    def has_bank_for(self, sequence: Sequence) -> bool:
        """Whether its adapters and those of all that run fit into the bank."""
        return len(self.adapters_in_use() | {name for name, _ in sequence.request.adapters}) <= MAX_LORAS

    def load(self, plan: LoadAdapter) -> None:
        """An adapter comes in where none stands that is in use."""
        assert 1 <= plan.slot <= MAX_LORAS
        assert plan.name not in self.bank.values(), "stands there already"
        assert self.bank.get(plan.slot) not in self.adapters_in_use(), "takes what another sequence uses"
        self.bank[plan.slot] = plan.name

    def check_bank(self, sequence: Sequence) -> None:
        names = tuple(name for name, _ in sequence.request.adapters)
        assert tuple(map(self.bank.get, sequence.bank_slots)) == names, "another adapter stands there"

    def ready(self) -> set[Place]:
        """Slots whose sequence could take a step."""
        return {r.at for r in self.running.values() if r.wants_step and not self.is_full(r.at)}

    def is_full(self, at: Place) -> bool:
        return len(self.memory[at].tokens) == self.pools[at[0]].capacity

    def movers(self) -> list[Running]:
        """Sequences that want more than their slot holds, below a pool that has room."""
        filled = [r for r in self.running.values() if r.wants_step and self.is_full(r.at)]
        for running in filled:
            running.filled = self.clock if running.filled is None else running.filled
        return [running for running in filled if self.free(running.at[0] + 1)]

    def use(self, at: Place) -> Memory:
        """The slot's memory, used just now."""
        self.clock += 1
        self.memory[at].used = self.clock
        return self.memory[at]

    def release(self, sequence: Sequence) -> None:
        """The sequence runs no more; what its slot holds stays there."""
        for running in [r for r in self.running.values() if r.sequence is sequence]:
            del self.running[running.at]
            self.use(running.at)
            if running in self.pending:
                self.pending.remove(running)

    def forget(self) -> None:
        for memory in self.memory.values():
            memory.keep(None, 0)

    def enter(self, sequence: Sequence, said: list[int], copy: Plan | None) -> list[Copy]:
        """The sequence holds the slot it should, in which stands all of its prompt that could be reused, and
        of all that could be reused before nothing is lost but the least worth.

        Returns the copies that must come next.
        """
        request, pool = sequence.request, self.pool_for(sequence)
        assert pool is not None, "let in before there is room"
        free, found = self.free(pool), self.reusable(pool, request)
        best = max(found.values())
        assert sequence.reused == best, "reuses more or less than stands there"
        here = [slot for slot in free if best and found[pool, slot] == best]
        at = self.least(pool, here or free, sequence.pool, sequence.slot)
        source = max(found, key=found.__getitem__) if best and not here else None
        copies = self.keep(at, request, source)
        if source is not None:
            copies.append(Copy(*source, *at, best // TILE))
            self.copy(copies[-1])
            if source not in self.running and source[0] == pool and self.memory[source].is_start_of(request):
                self.memory[source].keep(None, 0)  # stands in the new slot, too
        assert copy == (copies[0] if copies else None), "copies something else, or what nobody needs"
        self.use(at).keep((request.tenant, request.adapters), best)
        room = self.context - len(request.prompt_ids)
        wanted = room if request.params.max_tokens is None else min(request.params.max_tokens, room)
        self.running[at] = Running(sequence, at, said, wanted, self.clock)
        self.pending.append(self.running[at])
        return copies[1:]

    def keep(self, at: Place, request: Request, source: Place | None) -> list[Copy]:
        """What stood where this request comes stands elsewhere: the copies that this takes."""
        pool, memory = at[0], self.memory[at]
        free = [(pool, slot) for slot in range(self.pools[pool].slots) if (pool, slot) not in self.running]
        spare = min((place for place in free if place != source), key=lambda place: self.memory[place].worth)
        if not self.prefix_caching or memory.is_start_of(request) or spare == at:
            return []
        copy = Copy(*at, *spare, memory.computed // TILE)
        self.copy(copy)
        self.memory[spare].used = memory.used
        return [copy]

    def reusable(self, pool: int, request: Request) -> dict[Place, int]:
        """Of all slots whose content may come to this pool, how much of the prompt they hold."""
        near = [(p, s) for p in range(max(pool - 1, 0), pool + 1) for s in range(self.pools[p].slots)]
        return {at: self.memory[at].reusable(request) if self.prefix_caching else 0 for at in near}

    def least(self, pool: int, slots: list[int], to_pool: int | None, to_slot: int | None) -> Place:
        """The place that was taken: one of these slots, that none is worth less than."""
        assert to_pool == pool and to_slot in slots, "not a slot that it should take"
        at = pool, to_slot
        least = min(self.memory[pool, slot].worth for slot in slots)
        assert self.memory[at].worth == least, "loses more than it has to"
        return at

    def copy(self, plan: Copy) -> None:
        """The target holds the source's first tiles and nothing else."""
        held = self.memory[plan.from_pool, plan.from_slot]
        into = self.memory[plan.to_pool, plan.to_slot]
        into.owner, into.tokens = held.owner, held.tokens[: plan.tiles * TILE]
        into.computed = min(held.computed, len(into.tokens))

    def prefill(self, plan: Prefill) -> Call:
        """The first tiles of the pool whose prompt was let in first are computed, as many as pay."""
        assert self.pending, "nothing to compute"
        assert self.pending[0].at[0] == plan.pool, "a prompt is overtaken by another pool's"
        waiting, sizes = self.tiles_left(plan.pool), self.pools[plan.pool].tiles
        assert plan.rows == max((n for n in sizes if 4 * waiting >= 3 * n), default=min(sizes))
        assert len(plan.tiles) == min(waiting, plan.rows)
        call: Call = []
        for tile in plan.tiles:
            first = next(r for r in self.pending if r.at[0] == plan.pool)
            assert tile.sequence is first.sequence, "a prompt is overtaken, or has ended"
            assert tile.slot == first.at[1]
            self.compute(first, tile)
            if tile.is_last:
                self.pending.remove(first)
                call.append(first.ask())
        return call

    def compute(self, running: Running, tile: Tile) -> None:
        """The slot holds the tile's tokens, after all that stand before them in the prompt."""
        request, memory = running.sequence.request, self.memory[running.at]
        self.check_bank(running.sequence)
        assert memory.owner == (request.tenant, request.adapters), "another's tokens stand before"
        assert tuple(memory.tokens) == request.prompt_ids[: tile.start], "other tokens stand before"
        assert memory.computed == tile.start, "tokens stand before that decoding wrote"
        assert tile.start % TILE == 0, "a cut that depends on more than the prompt"
        assert tile.tokens == request.prompt_ids[tile.start : tile.start + TILE] != ()
        memory.tokens.extend(tile.tokens)
        memory.computed = len(memory.tokens)
        assert memory.computed <= self.pools[running.at[0]].capacity
        assert tile.is_last == (memory.computed == len(request.prompt_ids))

    def decode(self, plan: Decode) -> Call:
        """All sequences of the pool that could, and no others, are a token further."""
        pool = self.pools[plan.pool]
        ready = {slot for place, slot in self.ready() if place == plan.pool}
        assert ready == {slot for slot, sequence in enumerate(plan.sequences) if sequence is not None}
        assert plan.rows == len(plan.sequences) == min(rows for rows in pool.rows if rows > max(ready))
        call: Call = []
        for slot in sorted(ready):
            running, memory = self.running[plan.pool, slot], self.memory[plan.pool, slot]
            assert running.sequence is plan.sequences[slot]
            self.check_bank(running.sequence)
            memory.tokens.append(running.said[min(running.asked, len(running.said)) - 1])
            assert len(memory.tokens) <= pool.capacity, "writes past the slot"
            call.append(running.ask())
        return call

    def move(self, plan: Copy, kept: Copy | None) -> None:
        """A sequence that filled its slot goes on in the next pool; none that came later went first.

        kept: the copy before this one, of what stood in the new slot.
        """
        movers = self.movers()
        moved = next((r for r in movers if r.at == (plan.from_pool, plan.from_slot)), None)
        assert moved is not None, "moves a sequence that need not"
        for other in movers:
            if other.at[0] == plan.from_pool and other.filled is not None:
                assert moved.since <= other.filled, "a filled sequence starves"
        target = self.least(plan.from_pool + 1, self.free(plan.from_pool + 1), plan.to_pool, plan.to_slot)
        copies = self.keep(target, moved.sequence.request, None)
        assert copies == ([] if kept is None else [kept]), "a prefix is lost, or copied in vain"
        self.copy(plan)
        self.use(target)
        del self.running[moved.at]
        self.use(moved.at)
        moved.at, moved.since, moved.filled = target, self.clock, None
        self.running[target] = moved
