"""The device that kernels are measured on: what it could do, and how long a function takes there."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from realm_jax.kernels.pallas import tuning

LIMITS = {
    "NVIDIA H200": (4.3e12, 790e12),  # measured: a copy, and a large bf16 product
    "TPU v5 lite": (0.819e12, 197e12),  # the vendor's figures
    "TPU v6 lite": (1.64e12, 918e12),
}
"""Device kind -> bytes and bf16 operations per second."""

CHAINED = 20
"""So many calls are one program on a GPU or TPU: a launch from the host takes longer than a small kernel."""


@dataclass(frozen=True)
class Device:
    target: tuning.Target
    bandwidth: float | None  # bytes per second, if known
    flops: float | None

    @property
    def kind(self) -> str:
        return self.target.kind

    def bound(self, size: float, operations: float) -> float | None:
        """Seconds below which nothing can be that moves so many bytes and does so many operations."""
        if self.bandwidth is None or self.flops is None:
            return None
        return max(size / self.bandwidth, operations / self.flops)

    def seconds(self, step: Callable[[Any, Any], Any], state: Any, rest: Any, rounds: int) -> float:
        """The best time of one `step(state, rest)`, whose result is as its state: calls follow each other."""
        times = 1 if self.target.interpret else CHAINED

        @functools.partial(jax.jit, static_argnames="times")
        def chain(state: Any, rest: Any, times: int) -> Any:
            return jax.lax.fori_loop(0, times, lambda _, state: step(state, rest), state)

        jax.block_until_ready(chain(state, rest, times))
        found = []
        for _ in range(rounds):
            start = time.perf_counter()
            jax.block_until_ready(chain(state, rest, times))
            found.append((time.perf_counter() - start) / times)
        return min(found)


def device() -> Device:
    """Of this process."""
    target = tuning.target()
    known = [limits for kind, limits in LIMITS.items() if target.kind.startswith(kind)]
    return Device(target, *(known[0] if known else (None, None)))
