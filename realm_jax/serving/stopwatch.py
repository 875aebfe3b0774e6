"""Times the steps of an engine, for the drafting that weighs them."""

import time
from collections.abc import Callable

from realm_jax.serving.drafting import Drafting
from realm_jax.serving.plans import Decode

DISTURBED = 2
"""So many steps after something else may have waited for it: the one in flight, and the next."""


class Stopwatch:
    """A step takes from the reading of the one before, or from when it was given, until it is read."""

    def __init__(self, drafting: Drafting | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._drafting, self._clock = drafting, clock
        self._last_read = 0.0
        self._disturbed = 0

    def now(self) -> float:
        return self._clock()

    def disturb(self) -> None:
        """Something other than a step was given to the device, or a program was compiled."""
        self._disturbed = DISTURBED

    def read(self, plan: Decode | None, given: float) -> None:
        """A call that was given at that moment has just been read; plan: of a step."""
        now = self._clock()
        if plan is not None and self._drafting is not None:
            if self._disturbed:
                self._disturbed -= 1
            else:
                most = max(plan.sequences.count(s) for s in set(plan.sequences) - {None}) - 1
                self._drafting.took(plan.pool, plan.rows, most, now - max(self._last_read, given))
        self._last_read = now
