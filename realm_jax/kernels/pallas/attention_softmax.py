"""One step of attention's softmax over the cache, the same in every kernel.

M stacked queries, P positions of a block, H head dim; all arrays have two axes, as both compilers want.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

HIDDEN = -1e30
"""The score of a position that a query does not see."""

FLOOR = -5e29
"""The maximum before any score: so far above `HIDDEN` that a hidden position's weight is exactly 0."""

State = tuple[Float[Array, "M 1"], Float[Array, "M 1"], Float[Array, "M H"]]
"""The largest score, the sum of weights, and the weighted sum of values, of what was visited."""


@dataclass(frozen=True)
class Form:
    """What is fixed when a program is traced."""

    scale: float
    softcap: float | None
    window: int | None


def arithmetic(cached: jnp.dtype) -> jnp.dtype:
    """The type in which the numbers of a cache of this type are multiplied."""
    return cached if jnp.issubdtype(cached, jnp.floating) else jnp.dtype(jnp.bfloat16)


def empty(sinks: Float[Array, "M 1"] | None, rows: int, width: int) -> State:
    """Nothing visited; a sink counts as a position of no value."""
    out = jnp.zeros((rows, width), jnp.float32)
    if sinks is None:
        return jnp.full((rows, 1), FLOOR, jnp.float32), jnp.zeros((rows, 1), jnp.float32), out
    return sinks, jnp.ones((rows, 1), jnp.float32), out


def visit(
    state: State,
    q: Float[Array, "M H"],
    block: tuple[Array, Array],  # keys, values [P, H] as they are stored
    scales: tuple[Float[Array, "1 P"], Float[Array, "1 P"]] | None,
    at: Int[Array, "M 1"],
    places: Int[Array, "1 P"],
    form: Form,
) -> State:
    """The state with a block visited, by queries at these positions."""
    best, total, out = state
    keys, values = (_numbers(x) for x in block)
    scores = _dot(q, keys, 1) * form.scale
    if scales is not None:
        scores = scores * scales[0]
    if form.softcap is not None:
        scores = form.softcap * jnp.tanh(scores / form.softcap)
    distance = at - places
    sees = distance >= 0 if form.window is None else (distance >= 0) & (distance < form.window)
    scores = jnp.where(sees, scores, HIDDEN)
    new = jnp.maximum(best, jnp.max(scores, axis=1, keepdims=True))
    weights, rescale = jnp.exp(scores - new), jnp.exp(best - new)
    total = total * rescale + jnp.sum(weights, axis=1, keepdims=True)
    if scales is not None:
        weights = weights * scales[1]
    return new, total, out * rescale + _dot(weights.astype(values.dtype), values, 0)


def finish(state: State) -> Float[Array, "M H"]:
    """The mean of values; 0 where nothing was seen."""
    _, total, out = state
    return out / jnp.where(total > 0, total, 1.0)


def _numbers(x: Array) -> Array:
    if x.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    # by way of float32: neither compiler goes from int8 to bf16
    return x.astype(jnp.float32).astype(jnp.bfloat16) if x.dtype == jnp.int8 else x


def _dot(a: Array, b: Array, axis_of_b: int) -> Array:
    """In float32, and exactly that: of float32's bits, GPUs and TPUs would drop some."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((1,), (axis_of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
