"""What the C++ kernels compute, as functions of arrays; gradients pass through the plain formulas.

L tiles, I inputs, O outputs, D features; see `kernels.tiles` and `kernels.attention` for the rest.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8, UInt16, UInt32

from realm_jax.kernels import reference
from realm_jax.kernels.low_rank import LowRankForm
from realm_jax.kernels.tiles import TileFormat, tiles_backward


def tiles_matmul(
    x: Float[Array, "*lead I"], tiles: UInt8[Array, "L bytes"], form: TileFormat, outputs: int
) -> Float[Array, "*lead O"]:
    """`x @ weight.T`, with x rounded to int8 under a scale for each 32 inputs, and exact weights.

    A row's bits depend on that row alone.
    """
    y = _tiles_matmul(x.reshape(-1, x.shape[-1]), tiles, form, outputs)
    return y.reshape(*x.shape[:-1], outputs)  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tiles_matmul(x: Array, tiles: Array, form: TileFormat, outputs: int) -> Array:
    call = jax.ffi.ffi_call("realm_matmul", jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32))
    return call(x, tiles, **_format(form))  # pyright: ignore[reportReturnType]


def _tiles_forward(x: Array, tiles: Array, form: TileFormat, outputs: int) -> tuple[Array, Array]:
    return _tiles_matmul(x, tiles, form, outputs), tiles  # pyright: ignore[reportReturnType]


_tiles_matmul.defvjp(_tiles_forward, tiles_backward)  # as if x had not been rounded


def grouped_tiles_matmul(
    x: Float[Array, "T M I"],
    tiles: UInt8[Array, "E L bytes"],
    expert: Int[Array, "T"],
    form: TileFormat,
    outputs: int,
) -> Float[Array, "T M O"]:
    """Each tile of rows times the matrix of its expert, as `tiles_matmul`; zero where that is -1.

    Tiles that stand side by side and have one expert are multiplied together.
    """
    return _grouped_tiles_matmul(x, tiles, expert, form, outputs)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _grouped_tiles_matmul(x: Array, tiles: Array, expert: Array, form: TileFormat, outputs: int) -> Array:
    result = jax.ShapeDtypeStruct((*x.shape[:2], outputs), jnp.float32)
    call = jax.ffi.ffi_call("realm_grouped_matmul", result)
    return call(x, tiles, expert, **_format(form))  # pyright: ignore[reportReturnType]


def _grouped_tiles_forward(
    x: Array, tiles: Array, expert: Array, form: TileFormat, outputs: int
) -> tuple[Array, tuple[Array, Array]]:
    return _grouped_tiles_matmul(x, tiles, expert, form, outputs), (tiles, expert)  # pyright: ignore[reportReturnType]


def _grouped_tiles_backward(
    form: TileFormat, outputs: int, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None, None]:
    tiles, expert = kept

    def transposed(mine: Array, rows: Array) -> Array:
        return tiles_backward(form, outputs, mine, rows)[0]

    return _by_expert(transposed, tiles, expert, cotangent, form.inputs), None, None


_grouped_tiles_matmul.defvjp(_grouped_tiles_forward, _grouped_tiles_backward)


def _by_expert(
    transposed: Callable[[Array, Array], Array], weights: Array, expert: Array, cotangent: Array, inputs: int
) -> Array:
    """The transposed product of each tile's rows [T, M, I], expert by expert."""

    def add(total: Array, each: tuple[Array, Array]) -> tuple[Array, None]:
        number, mine = each
        is_mine = (expert == number)[:, None, None]

        def product() -> Array:
            return total + transposed(mine, jnp.where(is_mine, cotangent, 0.0))

        return jax.lax.cond(jnp.any(is_mine), product, lambda: total), None

    zeros = jnp.zeros((*cotangent.shape[:2], inputs))
    numbers = jnp.arange(weights.shape[0], dtype=expert.dtype)
    return jax.lax.scan(add, zeros, (numbers, weights))[0]


def _format(form: TileFormat) -> dict[str, Any]:
    return {
        "group": np.int64(form.group),
        "super_group": np.int64(form.super_group),
        "bits": np.int64(form.bits),
        "offset": np.int64(form.offset),
        "table": np.array(form.table, np.uint8),
        "is_float32": form.factor == "float32",
        "has_bytes": form.has_bytes,
        "has_minimum": form.has_minimum,
    }


@jax.custom_vjp
def matmul(x: Float[Array, "M I"], weight: Float[Array, "O I"]) -> Float[Array, "M O"]:
    """`x @ weight.T` of a bf16 weight, x rounded to bf16; I is a multiple of 32."""
    y = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call("realm_matmul_bf16", y)(x, weight)  # pyright: ignore[reportReturnType]


def _matmul_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, weight), (x, weight)  # pyright: ignore[reportReturnType]


def _matmul_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, ...]:
    return jax.vjp(reference.matmul, *kept)[1](cotangent)


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "T M I"], weight: Float[Array, "E O I"], expert: Int[Array, "T"]
) -> Float[Array, "T M O"]:
    """As `grouped_tiles_matmul`, of bf16 weights, x rounded to bf16."""
    result = jax.ShapeDtypeStruct((*x.shape[:2], weight.shape[1]), jnp.float32)
    return jax.ffi.ffi_call("realm_grouped_matmul_bf16", result)(x, weight, expert)  # pyright: ignore[reportReturnType]


def _grouped_forward(x: Array, weight: Array, expert: Array) -> tuple[Array, tuple[Array, Array]]:
    return grouped_matmul(x, weight, expert), (weight, expert)  # pyright: ignore[reportReturnType]


def _grouped_backward(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, None, None]:
    weight, expert = kept

    def transposed(mine: Array, rows: Array) -> Array:
        return jnp.matmul(rows, mine.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)

    return _by_expert(transposed, weight, expert, cotangent, weight.shape[2]), None, None


grouped_matmul.defvjp(_grouped_forward, _grouped_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*lead D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "*lead D"]:
    """Rows scaled to root mean square 1, then by `scale`."""
    y = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    return jax.ffi.ffi_call("realm_rms_norm", y)(x, scale, eps=np.float32(eps))  # pyright: ignore[reportReturnType]


def _norm_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    return rms_norm(x, scale, eps), (x, scale)  # pyright: ignore[reportReturnType]


def _norm_backward(eps: float, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, ...]:
    return jax.vjp(lambda x, scale: reference.rms_norm(x, scale, eps), *kept)[1](cotangent)


rms_norm.defvjp(_norm_forward, _norm_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T P"], sin: Float[Array, "B T P"], interleaved: bool
) -> Float[Array, "B T N H"]:
    """As `rope.rotate`."""
    call = jax.ffi.ffi_call("realm_rotate", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(x, cos, sin, interleaved=interleaved)  # pyright: ignore[reportReturnType]


def _rotate_forward(x: Array, cos: Array, sin: Array, interleaved: bool) -> tuple[Array, tuple[Array, Array]]:
    return rotate(x, cos, sin, interleaved), (cos, sin)  # pyright: ignore[reportReturnType]


def _rotate_backward(
    interleaved: bool, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None, None]:
    """Turned back."""
    cos, sin = kept
    return rotate(cotangent, cos, -sin, interleaved), None, None  # pyright: ignore[reportReturnType]


rotate.defvjp(_rotate_forward, _rotate_backward)


def attention(
    q: Float[Array, "B T N H"],
    k: Array,  # uint32 [S, K, C / 64, H / 2, 64], or int8 [S, K, C, H]
    v: Array,  # uint32 [S, K, C / 64, 32, H], or int8 [S, K, C, H]
    k_scale: Float[Array, "S K C"] | None,
    v_scale: Float[Array, "S K C"] | None,
    slots: Int[Array, "B"] | None,
    positions: Int[Array, "B T"],
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """As `kernels.attention`, of int8 codes or of bf16 in pairs, as the dot instruction takes them.

    A pair of keys is two neighbours of a head, one of values two positions; the first in the lower bits.
    """
    call = jax.ffi.ffi_call("realm_attention", jax.ShapeDtypeStruct(q.shape, jnp.float32))
    numbers = [_or_none(each, jnp.float32) for each in (k_scale, v_scale, sinks)]
    how = _scoring(scale, softcap, window)
    return call(q, k, v, *numbers, _or_none(slots), positions, **how)  # pyright: ignore[reportReturnType]


def write_cache(
    x: Float[Array, "B T K H"],
    slots: Int[Array, "B"] | None,
    positions: Int[Array, "B T"],
    cache: UInt32[Array, "S K blocks _ _"],
    *,
    is_keys: bool,
) -> UInt32[Array, "S K blocks _ _"]:
    """The packed cache with x in bf16 at the rows' slots and positions, in place where it is donated."""
    result = jax.ShapeDtypeStruct(cache.shape, cache.dtype)
    call = jax.ffi.ffi_call("realm_cache_write", result, input_output_aliases={3: 0})
    return call(x, _or_none(slots), positions, cache, is_keys=is_keys)  # pyright: ignore[reportReturnType]


def write_cache_int8(
    x: Float[Array, "B T K H"],
    slots: Int[Array, "B"] | None,
    positions: Int[Array, "B T"],
    cache: Int8[Array, "S K C H"],
    scales: Float[Array, "S K C"],
) -> tuple[Int8[Array, "S K C H"], Float[Array, "S K C"]]:
    """As `write_cache`, in codes from -127 to 127 under a scale for each token and head."""
    results = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (cache, scales)]
    call = jax.ffi.ffi_call("realm_cache_write_int8", results, input_output_aliases={3: 0, 4: 1})
    return tuple(call(x, _or_none(slots), positions, cache, scales))  # pyright: ignore[reportReturnType]


def extend(
    heads: Float[Array, "B T all H"],
    cos: Float[Array, "B T P"],
    sin: Float[Array, "B T P"],
    interleaved: bool,
    slots: Int[Array, "B"] | None,
    positions: Int[Array, "B T"],
    cache: tuple[Array, ...],  # keys and values, then, of int8, their scales
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "B T N H"], tuple[Array, ...]]:
    """What `rotate`, `write_cache` and `attention` give of N queries, K keys and K values, in one call.

    The cache is written in place where it is donated.
    """
    B, T, count, H = heads.shape
    shapes = [(B, T, count - 2 * cache[0].shape[1], H), *(each.shape for each in cache)]
    types = [jnp.float32, *(each.dtype for each in cache)]
    call = jax.ffi.ffi_call(
        "realm_extend",
        [jax.ShapeDtypeStruct(*each) for each in zip(shapes, types, strict=True)],
        input_output_aliases={5 + i: 1 + i for i in range(len(cache))},
    )
    numbers = [_or_none(each, jnp.float32) for each in (*[None] * (4 - len(cache)), sinks)]
    how = _scoring(scale, softcap, window)
    out, *written = call(
        heads, cos, sin, _or_none(slots), positions, *cache, *numbers, interleaved=interleaved, **how
    )
    return out, tuple(written)


def _scoring(scale: float, softcap: float | None, window: int | None) -> dict[str, Any]:
    return {
        "scale": np.float32(scale),
        "softcap": np.float32(softcap or 0),
        "window": np.int64(window or 0),
    }


def add_low_rank(
    y: Float[Array, "B *lead O"],
    x: Float[Array, "B *lead I"],
    bank: UInt16[Array, "L N"],
    ranks: Int[Array, "L projections"],
    index: Int[Array, "B A"],
    scale: Float[Array, "B A"],
    form: LowRankForm,
) -> Float[Array, "B *lead O"]:
    """y and what `kernels.low_rank` adds to it; x and `x @ a` are rounded to bf16.

    bank: bf16, each factor in vectors of pairs (`banks.in_vectors`). ranks: those of each slot and
    projection; what lies beyond is zeros and not read.
    """
    rows = y.reshape(-1, y.shape[-1])
    result = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    call = jax.ffi.ffi_call("realm_low_rank", result, input_output_aliases={0: 0})
    where: dict[str, Any] = {
        "outputs": np.array(form.outputs, np.int64),
        "rank": np.int64(form.rank),
        "start": np.int64(form.start),
        "column": np.int64(form.column),
    }
    changed = call(rows, x.reshape(-1, form.inputs), bank, ranks, index, scale, **where)
    return changed.reshape(y.shape)  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]


def _or_none(array: Array | None, dtype: Any = jnp.int32) -> Array:
    return jnp.zeros(0, dtype) if array is None else array
