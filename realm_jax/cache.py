"""Per-layer decode state. Every leaf leads with the slot axis; only lengths say what is valid.

S slots, C capacity, K kv heads, H head dim, B rows, T new tokens.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int


@struct.dataclass
class KVCache:
    """Keys and values of one layer. Positions at and past a slot's length are garbage by contract.

    bf16 is kept as its bits in uint16: XLA's CPU backend widens a bf16 update in place to a rewrite of
    the whole cache in float32, and leaves integers alone.
    """

    k: jax.Array  # [S, K, C, H]
    v: jax.Array  # [S, K, C, H]

    @classmethod
    def zeros(cls, slots: int, kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype) -> "KVCache":
        """An empty cache that stores float32 or bfloat16."""
        storage = jnp.uint16 if dtype == jnp.bfloat16 else dtype
        shape = (slots, kv_heads, capacity, head_dim)
        return cls(jnp.zeros(shape, storage), jnp.zeros(shape, storage))

    def write(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        first_slot: Int[Array, ""],
        positions: Int[Array, "B T"],
    ) -> "KVCache":
        """Row b's keys and values stand in slot `first_slot + b`, at its positions.

        A position at or past the capacity is dropped: that is how an idle row writes nothing.
        """
        slots = first_slot + jnp.arange(k.shape[0], dtype=positions.dtype)
        at = (slots[:, None], slice(None), positions)
        put = {"mode": "drop", "unique_indices": True}
        return KVCache(
            self.k.at[at].set(_encode(k, self.k.dtype), **put),
            self.v.at[at].set(_encode(v, self.v.dtype), **put),
        )

    def read(self, first_slot: Int[Array, ""], rows: int) -> tuple[Array, Array]:
        """Keys and values [B, K, C, H] of `rows` slots from `first_slot` on."""
        return tuple(_decode(_take(x, first_slot, rows)) for x in (self.k, self.v))  # pyright: ignore[reportReturnType]


def _take(x: Array, first: Int[Array, ""], rows: int) -> Array:
    if rows == x.shape[0]:
        return x
    return jax.lax.dynamic_slice_in_dim(x, first, rows)


def _encode(x: Array, storage: jnp.dtype) -> Array:
    """The numbers as they are stored; none is infinite or NaN.

    What a slot held before is masked by a weight of 0, and 0 * NaN would reach its next sequence.
    """
    kept = x.astype(jnp.bfloat16 if storage == jnp.uint16 else storage)
    kept = jnp.where(jnp.isfinite(kept), kept, jnp.zeros((), kept.dtype))
    return jax.lax.bitcast_convert_type(kept, jnp.uint16) if storage == jnp.uint16 else kept


def _decode(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
