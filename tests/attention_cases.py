"""Calls of attention over a slot cache, and what NumPy makes of them in float64."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {"float32": 4e-6, "float16": 2.0**-10, "bfloat16": 2.0**-8, "uint16": 2.0**-8, "int8": 2.0**-8}
"""Weights are rounded to the type of the values before they meet them; relative to the values' size."""


@dataclass(frozen=True)
class Case:
    """A call by its shape; `rows` says what each row has: its first position and how many tokens are real."""

    rows: tuple[tuple[int, int], ...]
    T: int
    N: int
    K: int
    H: int
    C: int
    dtype: str = "float32"
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    is_in_order: bool = False  # row b is slot b

    @property
    def how(self) -> dict[str, Any]:
        return {"scale": self.H**-0.5, "softcap": self.softcap, "window": self.window}


@dataclass(frozen=True, eq=False)
class Call:
    """A case's arrays."""

    arrays: tuple[Any, ...]  # q, k, v, k_scale, v_scale, slots, positions
    sinks: jax.Array | None
    is_real: np.ndarray  # [B, T]

    @property
    def numbers(self) -> tuple[np.ndarray, ...]:
        """q [B, T, N, H], k and v [B, K, C, H] as they are multiplied, in float64."""
        q, k, v, k_scale, v_scale, slots, _ = self.arrays
        rows = np.arange(len(q)) if slots is None else np.asarray(slots)
        stored = [np.asarray(x)[rows] for x in (k, v)]
        if k.dtype == jnp.uint16:
            stored = [x.view(BF16) for x in stored]
        kind = k.dtype if jnp.issubdtype(k.dtype, jnp.floating) else jnp.bfloat16
        keys, values = (x.astype(np.float64) for x in stored)
        if k_scale is not None:
            keys = keys * np.asarray(k_scale, np.float64)[rows][..., None]
            values = values * np.asarray(v_scale, np.float64)[rows][..., None]
        return np.asarray(q.astype(kind)).astype(np.float64), keys, values


def call(case: Case, seed: int = 0, *, hidden_block: int | None = None) -> Call:
    """Random arrays. Slots that no row names are NaN, and so are blocks of this size that no query sees."""
    rng = np.random.default_rng(seed)
    B, S = len(case.rows), len(case.rows) + (0 if case.is_in_order else 2)
    slots = np.arange(B) if case.is_in_order else rng.permutation(S)[:B]
    starts, counts = np.array(case.rows).T
    steps = np.arange(case.T)
    is_real = steps[None] < counts[:, None]
    positions = np.where(is_real, starts[:, None] + steps[None], case.C)
    q = rng.standard_normal((B, case.T, case.N, case.H))
    shape = (S, case.K, case.C, case.H)
    k, v = rng.standard_normal((2, *shape))
    k_scale = v_scale = None
    if case.dtype == "int8":
        k_scale, v_scale = rng.uniform(0.005, 0.02, (2, *shape[:3]))
        k, v = np.rint(k * 40).clip(-127, 127), np.rint(v * 40).clip(-127, 127)
    unseen = np.ones((S, case.C), bool)
    for b in range(B):
        if hidden_block is None or not counts[b]:
            continue
        first = max(0, starts[b] - case.window + 1) if case.window else 0
        end = -(-(starts[b] + counts[b]) // hidden_block) * hidden_block
        unseen[slots[b], first // hidden_block * hidden_block : end] = False
    if hidden_block is not None:
        for x in (k, v) if k_scale is None or v_scale is None else (k_scale, v_scale):
            x[np.broadcast_to(unseen[:, None], x.shape[:3])] = np.nan
    stored = [_stored(x, case.dtype) for x in (k, v)]
    scales = [None if x is None else jnp.asarray(x, jnp.float32) for x in (k_scale, v_scale)]
    given = None if case.is_in_order else jnp.asarray(slots, jnp.int32)
    sinks = jnp.asarray(rng.standard_normal(case.N) + 1, jnp.float32) if case.has_sinks else None
    arrays = (jnp.asarray(q, jnp.float32), *stored, *scales, given, jnp.asarray(positions, jnp.int32))
    return Call(arrays, sinks, is_real)


def _stored(x: np.ndarray, dtype: str) -> jax.Array:
    if dtype == "uint16":
        return jnp.asarray(x.astype(BF16).view(np.uint16))
    return jnp.asarray(x, jnp.dtype(dtype))


def exact(case: Case, made: Call) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, N, H]: softmax attention of each real query, and the same of the values' magnitudes."""
    q, k, v = made.numbers
    positions, group = np.asarray(made.arrays[-1]), case.N // case.K
    out, size = np.zeros(q.shape), np.zeros(q.shape)
    for b, t in np.argwhere(made.is_real):
        p = positions[b, t]
        first = 0 if case.window is None else max(0, p - case.window + 1)
        for n in range(case.N):
            scores = k[b, n // group, first : p + 1] @ q[b, t, n] * case.how["scale"]
            if case.softcap is not None:
                scores = case.softcap * np.tanh(scores / case.softcap)
            sink = -np.inf if made.sinks is None else float(made.sinks[n])
            best = max(scores.max(), sink)
            weights = np.exp(scores - best)
            weights /= weights.sum() + np.exp(sink - best)
            seen = v[b, n // group, first : p + 1]
            out[b, t, n], size[b, t, n] = weights @ seen, weights @ np.abs(seen)
    return out, size


def assert_close(found: Any, case: Case, made: Call) -> None:
    """Real queries have the exact result up to rounding; no query has NaN."""
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all()
    wanted, size = exact(case, made)
    excess = np.abs(found - wanted) - ROUNDING[case.dtype] * (size + 0.1)
    assert excess[made.is_real].max() <= 0, excess[made.is_real].max()
