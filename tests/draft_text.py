"""What a model says on its own: questions that it makes up, and its answers with their likeliest tokens."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from realm_jax import LLM, SamplingParams
from realm_jax.llm import GenerationOutput

ROUND = 64
"""Questions that are answered, and made, by one call."""

TOP = 20
"""Tokens of which a position's probabilities are kept."""

ASKING = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=64)
GREEDY = SamplingParams(temperature=0.0, logprobs=TOP)
SAMPLED = SamplingParams(temperature=0.8, logprobs=TOP)

OPENED = 0.5
"""The share of questions that begin with one of `OPENINGS`, for variety."""

OPENINGS = (
    *("What", "What is", "What are", "How", "How do I", "How can", "Why", "When", "Where", "Who", "Which"),
    *("Write", "Write a", "Explain", "Describe", "List", "Give me", "Tell me", "Can you", "Could you"),
    *("Is", "Are", "Does", "Summarize", "Rewrite", "Translate", "Compare", "Create", "Calculate", "Define"),
    *("I want", "I need", "My", "Please", "Name", "Suggest", "Imagine", "Convert", "Find", "Plan"),
)


@dataclass(frozen=True, eq=False)
class Answer:
    """A conversation and, for each token of its last turn, what the model found likely there."""

    ids: np.ndarray  # int32 [T]
    start: int  # of the answer
    top: np.ndarray  # int32 [n, K], best first
    share: np.ndarray  # float32 [n, K], a row's sum is 1
    is_greedy: bool

    @property
    def count(self) -> int:
        """Tokens of the answer."""
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Collection:
    """How much is collected.

    tokens: of answers. sampled: the share of answers that are sampled rather than greedy.
    """

    tokens: int
    seed: int = 0
    sampled: float = 0.25


def collect(
    llm: LLM, wanted: Collection, deadline: float, on_round: Callable[[int, int], None] = lambda *_: None
) -> list[Answer]:
    """Answers to questions that all differ, until there are enough, or no time for another round.

    The model makes up a question where a user would write (Magpie, Xu et al. 2024). A round answers the
    questions of the one before and makes new ones; the first two are made in any case.
    """
    rng = random.Random(wanted.seed)
    opened = opened_turn(llm)
    prompts: list[list[int]] = []
    answers: list[Answer] = []
    seen: set[str] = set()
    rounds = slowest = tokens = 0
    while rounds < 2 or (tokens < wanted.tokens and time.perf_counter() + slowest < deadline):
        start = time.perf_counter()
        openings = [rng.choice(OPENINGS) if rng.random() < OPENED else "" for _ in range(ROUND)]
        makers = [[*opened, *llm.tokenizer.encode(text, add_special=False)] for text in openings]
        answering = [_answering(rng, wanted.sampled) for _ in prompts]
        making = [replace(ASKING, seed=rng.getrandbits(32)) for _ in makers]
        outputs = llm.generate([*prompts, *makers], [*answering, *making])
        given = zip(outputs[: len(prompts)], answering, strict=True)
        answers += [answer_of(out, is_greedy=p.temperature == 0) for out, p in given if out.token_ids]
        made = zip(openings, outputs[len(prompts) :], strict=True)
        texts = dict.fromkeys((opening + output.text).strip() for opening, output in made)
        new = [text for text in texts if text and text not in seen]
        seen.update(new)
        prompts = [ids for text in new if len(ids := _prompt(llm, text)) <= llm.model.context // 2]
        tokens = sum(answer.count for answer in answers)
        rounds, slowest = rounds + 1, max(slowest, time.perf_counter() - start)
        on_round(len(answers), tokens)
    return answers


def _answering(rng: random.Random, sampled: float) -> SamplingParams:
    return replace(SAMPLED if rng.random() < sampled else GREEDY, seed=rng.getrandbits(32))


def answer_of(output: GenerationOutput, *, is_greedy: bool) -> Answer:
    """The output of a request with logprobs."""
    assert output.logprobs is not None
    pairs = np.array([entry["top"] for entry in output.logprobs])  # [n, K, 2]
    share = np.exp(pairs[..., 1])
    return Answer(
        ids=np.array([*output.prompt_token_ids, *output.token_ids], np.int32),
        start=len(output.prompt_token_ids),
        top=pairs[..., 0].astype(np.int32),
        share=(share / share.sum(axis=-1, keepdims=True)).astype(np.float32),
        is_greedy=is_greedy,
    )


def opened_turn(llm: LLM) -> list[int]:
    """The chat template's tokens up to where the user's words begin."""
    first, second = (_prompt(llm, text) for text in "Ab")
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [token for token, _ in pairs]


def _prompt(llm: LLM, question: str) -> list[int]:
    return llm.chat_prompt([{"role": "user", "content": question}])


def greedy_answers(llm: LLM, questions: Sequence[str]) -> list[Answer]:
    """The model's likeliest answers."""
    prompts = [_prompt(llm, text) for text in questions]
    outputs = llm.generate(prompts, GREEDY)
    return [answer_of(output, is_greedy=True) for output in outputs if output.token_ids]
