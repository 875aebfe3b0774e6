"""What the engine is given to do while it is measured: random prompts, continued greedily."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from realm_jax.llm import LLM
from realm_jax.params import SamplingParams
from realm_jax.serving.engine import Engine
from realm_jax.serving.request import Request

Prompts = Sequence[Sequence[int]]
Clock = Callable[[], float]  # seconds

_numbers = itertools.count()


class RandomPrompts:
    """Prompts of ordinary tokens, drawn with a seed; their first tokens go through the vocabulary in turn."""

    def __init__(self, llm: LLM, seed: int) -> None:
        known = range(min(llm.tokenizer.vocab_size, llm.model.config.vocab_size))
        ends = llm.tokenizer.eog_ids
        ordinary = [i for i in known if i not in ends and not llm.tokenizer.is_special(i)]
        self._rng = np.random.default_rng(seed)
        self._ordinary = np.array(ordinary)
        self._first = itertools.cycle(self._rng.permutation(self._ordinary).tolist())

    def draw(self, count: int, length: int) -> list[list[int]]:
        """So many prompts of so many tokens each."""
        rest = self._rng.choice(self._ordinary, (count, length - 1)).tolist()
        return [[next(self._first), *tokens] for tokens in rest]


def greedy(prompts: Prompts, max_tokens: int | None) -> list[Request]:
    """Requests that nothing ends but their number of tokens; None = the context's end."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=max_tokens)
    return [Request(f"benchmark-{next(_numbers)}", tuple(ids), params, seed=0) for ids in prompts]


def settle(engine: Engine, token: int) -> None:
    """The device has done all it was given, steps past the end of aborted sequences included."""
    while engine.has_work:
        engine.step()
    engine.add_request(*greedy([[token]], max_tokens=1))  # its answer comes after all that
    while engine.has_work:
        engine.step()
