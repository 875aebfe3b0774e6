"""Products, attention and sums whose bits do not depend on what else is in the batch.

B rows, T new tokens, C cache capacity, N query heads, K kv heads, H head dim, I in, O out.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.config import MIN_ROWS


@jax.custom_jvp
def row_sum(x: Float[Array, "*lead n"]) -> Float[Array, "*lead"]:
    """The sum of each row, by halving.

    A plain reduction lets the compiler pick an order that changes with the shape around the row; this
    tree depends on the row alone, and zeros appended to the row do not change it.
    """
    width = x.shape[-1]
    while width > 1:
        half = 1 << ((width - 1).bit_length() - 1)
        low, high = x[..., :half], x[..., half:]
        paired = width - half  # the rest of the lower half meets the zeros past the row's end
        x = jnp.concatenate([low[..., :paired] + high, low[..., paired:]], axis=-1)
        width = half
    return x[..., 0]


@row_sum.defjvp
def _row_sum_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Any sum does: what the tree's slices turn into backwards is many times slower."""
    return row_sum(*primals), tangents[0].sum(axis=-1)


def rms_norm(x: Float[Array, "*lead D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*lead D"]:
    """Rows scaled to root mean square 1, then by `scale` (Zhang and Sennrich 2019)."""
    mean_square = row_sum(x * x)[..., None] / x.shape[-1]
    return x * jax.lax.rsqrt(mean_square + eps) * jnp.broadcast_to(scale, x.shape)


def layer_norm(
    x: Float[Array, "*lead D"], scale: Float[Array, "*heads D"], bias: Float[Array, "*heads D"], eps: float
) -> Float[Array, "*lead D"]:
    """Rows brought to mean 0 and variance 1, times `scale`, plus `bias` (Ba et al. 2016)."""
    centered = x - row_sum(x)[..., None] / x.shape[-1]
    variance = row_sum(centered * centered)[..., None] / x.shape[-1]
    factors, shift = jnp.broadcast_to(scale, x.shape), jnp.broadcast_to(bias, x.shape)
    return centered * jax.lax.rsqrt(variance + eps) * factors + shift


def matmul(x: Float[Array, "*lead I"], weight: Float[Array, "O I"]) -> Float[Array, "*lead O"]:
    """`x @ weight.T` in float32, from inputs in the weight's type.

    Rows are padded to `MIN_ROWS`: a one-row product rewrites the whole weight on CPU, and sums it in
    another order. The result is asked for in float32, because a bf16 result is many times slower there.
    """
    y = _matmul(x.reshape(-1, x.shape[-1]).astype(jnp.float32), weight)
    return y.reshape(*x.shape[:-1], weight.shape[0])  # pyright: ignore[reportAttributeAccessIssue]


def per_head_matmul(x: Float[Array, "N M I"], weight: Float[Array, "N O I"]) -> Float[Array, "N M O"]:
    """`x[n] @ weight[n].T` in float32, from inputs in the weight's type; rows padded as in `matmul`."""
    rows = pad_axis(x.astype(weight.dtype), 1, MIN_ROWS)
    return product("nmi,noi->nmo", rows, weight)[:, : x.shape[1]]


def grouped_matmul(
    x: Float[Array, "T M I"], weight: Float[Array, "E O I"], expert: Int[Array, "T"]
) -> Float[Array, "T M O"]:
    """`x[t] @ weight[expert[t]].T` in float32, from inputs in the weight's type; experts in ascending order.

    Tiles of expert -1 come last; what stands for them is garbage.
    """
    T, M, I = x.shape  # noqa: E741
    E = weight.shape[0]
    sizes = M * (expert[:, None] == jnp.arange(E, dtype=expert.dtype)[None]).sum(axis=0, dtype=jnp.int32)
    y = jax.lax.ragged_dot(
        x.reshape(T * M, I).astype(weight.dtype),
        weight.swapaxes(1, 2),
        sizes,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return y.reshape(T, M, -1)


@jax.custom_vjp
def _matmul(x: Array, weight: Array) -> Array:
    rows = pad_axis(x.astype(weight.dtype), 0, MIN_ROWS)
    return _dot(rows, weight, 1, 1)[: x.shape[0]]


def _matmul_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _matmul(x, weight), (x, weight)  # pyright: ignore[reportReturnType]


def _matmul_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    """Products in the weight's type too: of float32 by bf16, XLA would widen the whole weight."""
    x, weight = kept
    dy = cotangent.astype(weight.dtype)
    return _dot(dy, weight, 1, 0), _dot(dy, x.astype(weight.dtype), 0, 0).astype(weight.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
    """The product of two matrices over these axes, in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axis_of_a,), (axis_of_b,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal attention of each query to the cache positions up to its own, in float32.

    A query at position p sees positions max(0, p - window + 1) .. p. The plain formula, differentiable.
    sinks: a score per head that joins the softmax without a value.
    """
    T, N = q.shape[1:3]
    K, C = k.shape[1:3]
    stacked = stack_heads(q, K).astype(k.dtype)
    at = jnp.tile(positions, (1, N // K))
    scores = product("bkmh,bkch->bkmc", stacked, k) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(_visible(at, C, window)[:, None], scores, -1e30)
    best = scores.max(axis=-1)
    sink = None if sinks is None else stack_sinks(sinks, K, T)
    best = best if sink is None else jnp.maximum(best, sink)
    weights = jnp.exp(scores - best[..., None])
    total = row_sum(weights)
    total = total if sink is None else total + jnp.exp(sink - best)
    return unstack_heads(product("bkmc,bkch->bkmh", weights.astype(v.dtype), v) / total[..., None], T)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    k_scale: Array | None,
    v_scale: Array | None,
    slots: Array | None,
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """As `kernels.attention`: each row's slot is taken out of the cache, and the plain formula follows."""
    rows = jnp.arange(q.shape[0], dtype=jnp.int32) if slots is None else slots
    keys, values = decode(k[rows]), decode(v[rows])
    if k_scale is not None and v_scale is not None:
        keys = keys.astype(jnp.float32) * k_scale[rows][..., None]
        values = values.astype(jnp.float32) * v_scale[rows][..., None]
    how = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks}
    return attention(q, keys, values, positions, **how)


def decode(x: Array) -> Array:
    """The numbers of a cache as they are multiplied; int8 codes are exact in bf16."""
    if x.dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    return x.astype(jnp.bfloat16) if x.dtype == jnp.int8 else x


def stack_heads(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K M H"]:
    """The queries that share a kv head, as the rows of one product."""
    B, T, N, H = q.shape
    group = N // kv_heads
    return q.reshape(B, T, kv_heads, group, H).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, group * T, H)


def unstack_heads(out: Float[Array, "B K M H"], T: int) -> Float[Array, "B T N H"]:
    """`stack_heads` undone, for T tokens."""
    B, K, M, H = out.shape
    return out.reshape(B, K, M // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def stack_sinks(sinks: Float[Array, "N"], kv_heads: int, T: int) -> Float[Array, "1 K M"]:
    """The sink of each row of `stack_heads`."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(1, kv_heads, -1), T, axis=2)


def _visible(at: Int[Array, "B M"], capacity: int, window: int | None) -> Array:
    """[B, M, C]: whether a query at a position sees a cache position."""
    distance = at[:, :, None] - jnp.arange(capacity, dtype=at.dtype)[None, None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def product(equation: str, a: Array, b: Array) -> Array:
    """The einsum in float32."""
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def pad_axis(x: Array, axis: int, least: int) -> Array:
    """`x` with zeros appended until `axis` has `least` entries."""
    missing = least - x.shape[axis]
    if missing <= 0:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
