"""The door to attention over a slot cache: one meaning, several implementations.

B rows, T new tokens, S slots, C cache capacity, N query heads, K kv heads, H head dim.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.config import Kernels
from realm_jax.errors import UnsupportedError
from realm_jax.kernels import blockwise, reference


def attention(
    q: Float[Array, "B T N H"],
    k: Array,  # [S, K, C, H]
    v: Array,  # [S, K, C, H]
    k_scale: Float[Array, "S K C"] | None,
    v_scale: Float[Array, "S K C"] | None,
    slots: Int[Array, "B"] | None,
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    kernels: Kernels = "xla",
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of each query to its slot's cache positions up to its own, in float32.

    A query at position p sees positions max(0, p - window + 1) .. p; one at or past the capacity is idle
    and gets garbage. k, v: float32, bf16, bf16's bits in uint16, or int8 codes to be multiplied by their
    scales. slots: None where row b is slot b. sinks: a score per head, of a position of no value that every
    query sees too; neither scaled nor capped.
    """
    kept = (q, k, v, k_scale, v_scale, slots, positions, sinks)
    return _attention(*kept, scale, softcap, window, kernels)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(8, 9, 10, 11))
def _attention(
    q: Array,
    k: Array,
    v: Array,
    k_scale: Array | None,
    v_scale: Array | None,
    slots: Array | None,
    positions: Array,
    sinks: Array | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    kernels: Kernels,
) -> Array:
    how = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
    return _IMPLEMENTATIONS[kernels](q, k, v, k_scale, v_scale, slots, positions, **how)


def _pallas(*arrays: Any, **how: Any) -> Array:
    from realm_jax.kernels.pallas.attention import attention  # half a second that others need not wait

    return attention(*arrays, **how)


_IMPLEMENTATIONS = {
    "reference": reference.cached_attention,
    "xla": blockwise.attention,
    "pallas": _pallas,
    "native": blockwise.attention,  # of what the C++ kernels do not take: they have caches of their own
}


def _forward(
    q: Array,
    k: Array,
    v: Array,
    k_scale: None,
    v_scale: None,
    slots: Array | None,
    positions: Array,
    sinks: Array | None,
    *how: Any,
) -> tuple[Array, tuple[Array | None, ...]]:
    out = _attention(q, k, v, k_scale, v_scale, slots, positions, sinks, *how)
    return out, (q, k, v, slots, positions, sinks)  # pyright: ignore[reportReturnType]


def _backward(
    scale: float,
    softcap: float | None,
    window: int | None,
    kernels: Kernels,
    kept: tuple[Any, ...],
    cotangent: Array,
) -> tuple[Array | None, ...]:
    """The gradient of the plain formula: a kernel, or a loop whose length is data, has none of its own."""
    q, k, v, slots, positions, sinks = kept
    rows = jnp.arange(q.shape[0], dtype=jnp.int32) if slots is None else slots
    if not jnp.issubdtype(k.dtype, jnp.floating):
        raise UnsupportedError(
            f"gradients cannot pass a cache of {k.dtype}; use dtype='float32', kv_dtype='float32'"
        )

    def plain(q: Array, k: Array, v: Array, sinks: Array | None) -> Array:
        how = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
        return reference.attention(q, k[rows], v[rows], positions, **how)

    dq, dk, dv, dsinks = jax.vjp(plain, q, k, v, sinks)[1](cotangent)
    return dq, dk, dv, None, None, None, None, dsinks


_attention.defvjp(_forward, _backward)
