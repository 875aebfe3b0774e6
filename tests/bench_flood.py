"""Latency of one tenant while another has the engine: nothing, its share, all but a slot, or a flood.

B asks one question after another. Beside it A has always so many requests at the engine: none ("alone"), half
of the slots ("share": nobody waits, each has what is fair), all slots but one ("busy": nobody waits, a step
costs what it costs beside a flood), or all and 100 more that wait ("flood"). The four take turns; medians,
and the flood's ratio to each. Against "busy" it is what the queue costs B; against "alone" also what a step
of many sequences costs more than one of a single sequence, whoever they belong to.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from realm_jax import LLM, SamplingParams
from realm_jax.serving.request import Request

WAITING = 100
GAP = 10
"""Steps of the engine between B's requests."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of prompts and answers; A's answers have from half to three halves of it, so that ends vary."""

    prompt: int
    answer: int
    vocab: int


@dataclass(frozen=True)
class Asked:
    """How long a request of B took, by the clock."""

    first: float
    whole: float


class Neighbours:
    """Two tenants on an engine, which is stepped here."""

    def __init__(self, llm: LLM, sizes: Sizes, clock: Callable[[], float], seed: int = 0) -> None:
        self._engine, self._sizes, self._clock = llm.engine, sizes, clock
        self._random, self._count = random.Random(seed), 0
        self._slots = llm.engine_config.max_num_seqs
        self._crowd: set[str] = set()  # A's requests at the engine
        self._wanted = 0

    def crowds(self) -> dict[str, int]:
        """How many requests A has at the engine, by name."""
        slots = self._slots
        return {"alone": 0, "share": slots // 2, "busy": slots - 1, "flood": slots + WAITING}

    def measure(self, crowd: int, questions: int) -> list[Asked]:
        """What B's questions took beside so many of A's. Then nothing runs."""
        self._wanted = crowd
        self._ask()  # who was never here has no slot kept
        for _ in range(4 * self._sizes.answer if crowd else 0):  # until A's end one by one
            self._step()
        found = []
        for _ in range(questions):
            for _ in range(GAP):
                self._step()
            found.append(self._ask())
        self._wanted = 0
        for name in list(self._crowd):
            self._engine.abort(name)
        self._crowd.clear()
        while self._engine.has_work:
            self._engine.step()
        return found

    def _ask(self) -> Asked:
        start, first = self._clock(), None
        name = self._add("B", self._sizes.answer)
        while True:
            for request, has_token, is_end in self._step():
                if request != name:
                    continue
                if first is None and has_token:
                    first = self._clock() - start
                if is_end:
                    assert first is not None
                    return Asked(first, self._clock() - start)

    def _step(self) -> list[tuple[str, bool, bool]]:
        """Whose requests moved on: whether by a token, and whether to the end. A's ends are made good."""
        while len(self._crowd) < self._wanted:
            least = max(self._sizes.answer // 2, 1)
            self._crowd.add(self._add("A", self._random.randint(least, 3 * least)))
        deltas = self._engine.step()
        self._crowd -= {delta.request_id for delta in deltas if delta.output is not None}
        return [(d.request_id, bool(d.token_ids), d.output is not None) for d in deltas]

    def _add(self, tenant: str, tokens: int) -> str:
        self._count += 1
        ids = tuple(self._random.randrange(3, self._sizes.vocab) for _ in range(self._sizes.prompt))
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        request = Request(f"{tenant}{self._count}", ids, params, seed=0, tenant=tenant)
        self._engine.add_request(replace(request, arrival=time.perf_counter()))
        return request.id


def report(rounds: list[dict[str, list[Asked]]]) -> dict[str, dict[str, float]]:
    """Medians over all rounds, and the flood's ratios to the others: medians of the rounds' ratios."""
    found: dict[str, dict[str, float]] = {}
    for what in ("first", "whole"):
        middles = [
            {name: statistics.median(getattr(a, what) for a in asked) for name, asked in each.items()}
            for each in rounds
        ]
        row = {name: statistics.median(middle[name] for middle in middles) for name in middles[0]}
        for name in ("alone", "share", "busy"):
            row[f"flood/{name}"] = statistics.median(each["flood"] / each[name] for each in middles)
        found[what] = {name: round(value, 4) for name, value in row.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=32)
    parser.add_argument("--questions", type=int, default=5, help="of B in each turn")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    llm = LLM(asked.model, ctx_size=1024, max_num_seqs=asked.slots)
    sizes = Sizes(asked.prompt, asked.answer, llm.model.config.vocab_size)
    both = Neighbours(llm, sizes, time.perf_counter)
    rounds = [
        {name: both.measure(count, asked.questions) for name, count in both.crowds().items()}
        for _ in range(asked.rounds + 1)
    ][1:]  # the first compiles
    facts = {"slots": asked.slots, "prompt": asked.prompt, "answer": asked.answer, "waiting": WAITING}
    print(json.dumps(facts | {"seconds": report(rounds)}))


if __name__ == "__main__":
    main()
