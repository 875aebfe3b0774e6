"""Where one answer stands in its grammar."""

from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import llguidance


class Verdict(Enum):
    """What a token led to."""

    GOES_ON = "goes on"
    COMPLETE = "complete"  # nothing but the end may follow
    STUCK = "stuck"  # nothing may follow, or llguidance met a limit of its own


class Matcher:
    """One sequence's way through a grammar: the mutable record.

    allowed: uint32 words, a bit for each token of the model's vocabulary, which says whether it may follow.
    """

    def __init__(
        self, start: "llguidance.LLMatcher", words: int, known: np.ndarray, ends: np.ndarray
    ) -> None:
        """`start` stays as it is; the others are as in `Grammar`."""
        self._matcher = start.deep_copy()
        self._mask = np.zeros(words, np.uint32)
        self._known, self._ends = known, ends
        self.allowed = np.zeros_like(ends)
        self.verdict = self._look()

    def advance(self, token: int) -> Verdict:
        """The token stands; `allowed` says what may follow it."""
        self._matcher.consume_token(token)
        self.verdict = self._look()
        return self.verdict

    def _look(self) -> Verdict:
        matcher = self._matcher
        if not matcher.is_stopped():
            matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            return Verdict.STUCK
        if matcher.is_stopped():
            return Verdict.COMPLETE
        size = min(len(self._mask), len(self._ends))
        self.allowed = np.zeros_like(self._ends)  # a new one: the device may still read the last
        self.allowed[:size] = self._mask[:size] & self._known[:size]
        if (self.allowed & ~self._ends).any():
            return Verdict.GOES_ON
        return Verdict.COMPLETE if matcher.is_accepting() else Verdict.STUCK
