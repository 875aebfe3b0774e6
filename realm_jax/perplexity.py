"""Perplexity of a text, as llama-perplexity defines it."""

import math
from collections.abc import Iterator, Sequence

from realm_jax.errors import RequestError
from realm_jax.llm import LLM

TOGETHER = 4
"""Windows that are scored together: enough to fill a prefill call, few enough to show progress."""


def perplexities(llm: LLM, ids: Sequence[int], *, window: int, bos: int | None = None) -> Iterator[float]:
    """The running perplexity after each window.

    The text is cut into windows; in each, the second half is scored, given all before it in the window.
    bos replaces a window's first token. Raises RequestError if the text fills no window.
    """
    if len(ids) < window:
        raise RequestError(f"text is {len(ids):,} tokens; one window is {window:,} (lower --ctx-size)")
    windows = [list(ids[start : start + window]) for start in range(0, len(ids) - window + 1, window)]
    if bos is not None:
        windows = [[bos, *each[1:]] for each in windows]
    total, count = 0.0, 0
    for i in range(0, len(windows), TOGETHER):
        for score in llm.score(windows[i : i + TOGETHER]):
            scored = score.logprobs[window // 2 + 1 :]
            total -= math.fsum(p for p in scored if p is not None)
            count += len(scored)
            yield math.exp(total / count)
