"""Prompts as callers give them: text or token ids, one or several."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from realm_jax.errors import RequestError
from realm_jax.tokenizer import Tokenizer

Prompt = str | Sequence[int]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts; a string or a list of token ids is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise RequestError(
            f"prompts is of type {type(prompts).__name__}; give text, token ids or a list of them"
        )
    batch: list[Any] = list(prompts)
    if batch and all(isinstance(item, int | np.integer) for item in batch):
        return [batch]
    return batch


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The prompt's tokens: text encoded with special tokens added and parsed, token ids as they are."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special=True, parse_special=True)
    if not isinstance(prompt, Sequence | np.ndarray):
        raise RequestError(f"prompt is of type {type(prompt).__name__}; give text or token ids")
    for i in prompt:
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise RequestError(f"prompt has {i!r}; token ids are whole numbers")
    return [int(i) for i in prompt]


def split(tokenizer: Tokenizer, prompt: Prompt, continuation: Prompt) -> tuple[list[int], list[int]]:
    """The tokens of a prompt, and those that the continuation adds.

    Text continues text: what both have together counts, and a token that spans them is the continuation's.
    """
    context = prompt_ids(tokenizer, prompt)
    if isinstance(prompt, str) and isinstance(continuation, str):
        both = prompt_ids(tokenizer, prompt + continuation)
        shared = next(
            (i for i, pair in enumerate(zip(context, both, strict=False)) if pair[0] != pair[1]),
            len(context),
        )
        return both[:shared], both[shared:]
    if isinstance(continuation, str):
        return context, tokenizer.encode(continuation, add_special=False, parse_special=True)
    return context, prompt_ids(tokenizer, continuation)
