"""Per-layer decode state. Every leaf leads with slots, heads, positions; only lengths say what is valid.

S slots, C capacity, K kv heads, H head dim, B rows, T new tokens, N query heads.
"""

from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.config import BLOCK, Kernels, LayerKind, ModelConfig, Numerics
from realm_jax.kernels import attention
from realm_jax.kernels.native import calls
from realm_jax.kernels.tiles import LANES
from realm_jax.recurrent_cache import RecurrentCache

Slots = Int[Array, "B"] | None
"""The slot of each row; None where row b is slot b."""


@runtime_checkable
class Rotation(Protocol):
    """The turns of a call's positions, as `nodes.Rotation` has them."""

    cos: jax.Array  # [B, T, P]
    sin: jax.Array  # [B, T, P]
    interleaved: bool

    def __call__(self, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]: ...


@runtime_checkable
class Cache(Protocol):
    """One layer's keys and values. Positions at and past a slot's length are garbage by contract."""

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        slots: Slots,
        positions: Int[Array, "B T"],
    ) -> "Cache":
        """Each row's keys and values stand in its slot, at its positions.

        A position at or past the capacity, or a slot past the last, is dropped.
        """
        ...

    def attend(
        self,
        q: Float[Array, "B T N H"],
        slots: Slots,
        positions: Int[Array, "B T"],
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Float[Array, "N"] | None = None,
    ) -> Float[Array, "B T N H"]:
        """What each query sees of its slot; sinks: as `kernels.attention` has them."""
        ...

    def extend(
        self,
        heads: Float[Array, "B T N+2*K H"],
        turn: Rotation,
        slots: Slots,
        positions: Int[Array, "B T"],
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Float[Array, "N"] | None = None,
    ) -> "tuple[Float[Array, 'B T N H'], Cache]":
        """What each query sees of its slot once the new keys and values stand there.

        heads: queries, then keys, then values; the first two are turned.
        """
        ...


@struct.dataclass
class NoCache:
    """What a layer keeps that reads an earlier one's keys and values."""


LayerCache = Cache | RecurrentCache | NoCache


def empty_caches(model: ModelConfig, slots: int, capacity: int, numerics: Numerics) -> tuple[LayerCache, ...]:
    """Caches of so many empty slots, one for each layer of a model."""
    return tuple(_of_layer(model, kind, slots, capacity, numerics) for kind in model.layers)


def _of_layer(
    model: ModelConfig, kind: LayerKind, slots: int, capacity: int, numerics: Numerics
) -> LayerCache:
    if kind.keys_of is not None:
        return NoCache()
    if kind.delta_net is not None:
        return RecurrentCache.empty(slots, capacity, kind.delta_net)
    sizes = model.of(kind)
    shape = slots, sizes.num_kv_heads, capacity, sizes.head_dim
    if _is_latent(model, numerics.kv_dtype):
        return LatentCache(jnp.zeros(shape, _storage(numerics)), kernels=numerics.kernels)
    return empty_cache(shape, numerics)


def _is_latent(model: ModelConfig, kv_dtype: str) -> bool:
    """Whether keys and values are kept as one; int8 codes have scales of their own for each."""
    return model.latent is not None and kv_dtype != "int8"


def empty_cache(shape: tuple[int, int, int, int], numerics: Numerics) -> Cache:
    """An empty cache [S, K, C, H] that stores float32, bfloat16 or int8."""
    S, K, C, H = shape
    is_native = numerics.kernels == "native" and H % LANES == 0  # they take heads of whole vectors
    if numerics.kv_dtype == "int8":
        codes, scales = jnp.zeros(shape, jnp.int8), jnp.zeros(shape[:3], jnp.float32)
        kind = NativeInt8Cache if is_native else Int8Cache
        return kind(codes, codes.copy(), scales, scales.copy(), kernels=numerics.kernels)
    if is_native and numerics.kv_dtype == "bfloat16":
        k, v = (S, K, C // BLOCK, H // 2, BLOCK), (S, K, C // BLOCK, BLOCK // 2, H)
        return NativeKVCache(jnp.zeros(k, jnp.uint32), jnp.zeros(v, jnp.uint32), kernels=numerics.kernels)
    storage = _storage(numerics)
    return KVCache(jnp.zeros(shape, storage), jnp.zeros(shape, storage), kernels=numerics.kernels)


def _storage(numerics: Numerics) -> type:
    """bf16 is kept as its bits where XLA's CPU backend writes it, which widens an update of bf16 in place to
    a rewrite of the whole cache in float32, and leaves integers alone."""
    if numerics.kv_dtype == "float32":
        return jnp.float32
    return jnp.bfloat16 if numerics.kernels == "pallas" else jnp.uint16


def cached_bytes(model: ModelConfig, kv_dtype: str) -> int:
    """Bytes that the caches of all layers with keys and values keep of one token."""
    arrays = 1 if _is_latent(model, kv_dtype) else 2
    width, scale = {"int8": (1, 4), "bfloat16": (2, 0), "float32": (4, 0)}[kv_dtype]
    keeping = [kind for kind in model.layers if kind.delta_net is None and kind.keys_of is None]
    sizes = map(model.of, keeping)
    return arrays * sum(each.num_kv_heads * (width * each.head_dim + scale) for each in sizes)


class Stepwise:
    """A cache whose `extend` is what its words say, one after the other."""

    def extend(
        self: Any, heads: Array, turn: Rotation, slots: Slots, positions: Array, **how: Any
    ) -> tuple[Array, Any]:
        """As `Cache.extend`."""
        kv = self.k.shape[1]
        q, k, v = jnp.split(heads, (heads.shape[2] - 2 * kv, heads.shape[2] - kv), axis=2)
        cache = self.write(turn(k), v, slots, positions)
        return cache.attend(turn(q), slots, positions, **how), cache


@struct.dataclass
class KVCache(Stepwise):
    """Keys and values as numbers, bf16 as such or as its bits in uint16."""

    k: jax.Array  # [S, K, C, H]
    v: jax.Array  # [S, K, C, H]
    kernels: Kernels = struct.field(pytree_node=False, default="xla")

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "KVCache":
        """As `Cache.write`."""
        at = _places(slots, positions)
        k, v = _encode(k, self.k.dtype), _encode(v, self.v.dtype)
        return replace(self, k=_put(self.k, at, k), v=_put(self.v, at, v))

    def attend(
        self,
        q: Array,
        slots: Slots,
        positions: Array,
        **how: Any,
    ) -> Array:
        """As `Cache.attend`."""
        return self._attention(q, self.k, self.v, None, None, slots, positions, **how)

    def _attention(self, *arrays: Any, **how: Any) -> Array:
        return attention(*arrays, **how, kernels=self.kernels)


@struct.dataclass
class LatentCache(Stepwise):
    """One vector a token, which is the key of all heads and their value, the key's turned part apart.

    That part of what `attend` gives means nothing.
    """

    k: jax.Array  # [S, 1, C, H]
    kernels: Kernels = struct.field(pytree_node=False, default="xla")

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "LatentCache":
        """As `Cache.write`; values are part of the keys."""
        at = _places(slots, positions)
        return replace(self, k=_put(self.k, at, _encode(k, self.k.dtype)))

    def attend(self, q: Array, slots: Slots, positions: Array, **how: Any) -> Array:
        """As `Cache.attend`."""
        return attention(q, self.k, self.k, None, None, slots, positions, **how, kernels=self.kernels)


@struct.dataclass
class Int8Cache(Stepwise):
    """Keys and values as int8 codes, each token's head with a scale of its own."""

    k: jax.Array  # [S, K, C, H]
    v: jax.Array  # [S, K, C, H]
    k_scale: jax.Array  # [S, K, C]
    v_scale: jax.Array  # [S, K, C]
    kernels: Kernels = struct.field(pytree_node=False, default="xla")

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "Int8Cache":
        """As `Cache.write`, rounded to the nearest code."""
        at = _places(slots, positions)
        (k, k_scale), (v, v_scale) = _quantize(k), _quantize(v)
        return replace(
            self,
            k=_put(self.k, at, k),
            v=_put(self.v, at, v),
            k_scale=_put(self.k_scale, at, k_scale),
            v_scale=_put(self.v_scale, at, v_scale),
        )

    def attend(
        self,
        q: Array,
        slots: Slots,
        positions: Array,
        **how: Any,
    ) -> Array:
        """As `Cache.attend`: scores and weights are multiplied by the scales, the codes as they are."""
        kept = (self.k, self.v, self.k_scale, self.v_scale)
        return self._attention(q, *kept, slots, positions, **how)

    def _attention(self, *arrays: Any, **how: Any) -> Array:
        return attention(*arrays, **how, kernels=self.kernels)


@struct.dataclass
class NativeKVCache(KVCache):
    """bf16 in pairs, as the C++ kernels take them; see `kernels.native.calls.attention`."""

    k: jax.Array  # [S, K, C / 64, H / 2, 64]
    v: jax.Array  # [S, K, C / 64, 32, H]

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "NativeKVCache":
        """As `Cache.write`."""
        k = calls.write_cache(k, slots, positions, self.k, is_keys=True)
        return replace(self, k=k, v=calls.write_cache(v, slots, positions, self.v, is_keys=False))

    def extend(
        self, heads: Array, turn: Rotation, slots: Slots, positions: Array, **how: Any
    ) -> "tuple[Array, NativeKVCache]":
        """As `Cache.extend`, in one call."""
        turns = turn.cos, turn.sin, turn.interleaved
        out, kept = calls.extend(heads, *turns, slots, positions, (self.k, self.v), **how)
        return out, replace(self, k=kept[0], v=kept[1])

    def _attention(self, *arrays: Any, **how: Any) -> Array:
        return calls.attention(*arrays, **how)


@struct.dataclass
class NativeInt8Cache(Int8Cache):
    """int8 codes that the C++ kernels write and read."""

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "NativeInt8Cache":
        """As `Cache.write`."""
        k, k_scale = calls.write_cache_int8(k, slots, positions, self.k, self.k_scale)
        v, v_scale = calls.write_cache_int8(v, slots, positions, self.v, self.v_scale)
        return replace(self, k=k, v=v, k_scale=k_scale, v_scale=v_scale)

    def extend(
        self, heads: Array, turn: Rotation, slots: Slots, positions: Array, **how: Any
    ) -> "tuple[Array, NativeInt8Cache]":
        """As `Cache.extend`, in one call."""
        turns = turn.cos, turn.sin, turn.interleaved
        kept = self.k, self.v, self.k_scale, self.v_scale
        out, kept = calls.extend(heads, *turns, slots, positions, kept, **how)
        return out, NativeInt8Cache(*kept, kernels=self.kernels)

    def _attention(self, *arrays: Any, **how: Any) -> Array:
        return calls.attention(*arrays, **how)


def _places(slots: Slots, positions: Int[Array, "B T"]) -> tuple[Array, slice, Array]:
    rows = jnp.arange(positions.shape[0], dtype=positions.dtype) if slots is None else slots
    return rows[:, None], slice(None), positions


def _put(x: Array, at: tuple[Array, slice, Array], values: Array) -> Array:
    return x.at[at].set(values, mode="drop", unique_indices=True)


def _quantize(x: Float[Array, "B T K H"]) -> tuple[Array, Array]:
    """Codes from -127 to 127 and the scales [B, T, K] that make them numbers again."""
    x = _finite(x)
    scale = jnp.abs(x).max(axis=-1) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1.0)[..., None])
    return codes.astype(jnp.int8), scale


def _encode(x: Array, storage: jnp.dtype) -> Array:
    """The numbers as they are stored."""
    kept = _finite(x.astype(jnp.bfloat16 if storage == jnp.uint16 else storage))
    return jax.lax.bitcast_convert_type(kept, jnp.uint16) if storage == jnp.uint16 else kept


def _finite(x: Array) -> Array:
    """The numbers, 0 where one is infinite or NaN.

    What a slot held before is masked by a weight of 0, and 0 * NaN would reach its next sequence.
    """
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
