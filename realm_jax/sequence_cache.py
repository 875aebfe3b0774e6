"""The cache of training and research: a sequence's own keys and values, and the plain formula over them.

B rows, T tokens, N query heads, K kv heads, H head dim.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.cache import LayerCache, NoCache, Slots, Stepwise
from realm_jax.config import ModelConfig
from realm_jax.kernels.reference import product

HIDDEN = -1e30
"""The score of a position that a query does not see: its weight is exactly 0."""


@struct.dataclass
class SequenceCache(Stepwise):
    """Keys and values of whole sequences, each row's positions 0 to T - 1. Nothing outlives the call."""

    k: jax.Array  # [B, K, T, H]
    v: jax.Array  # [B, K, T, H]

    @classmethod
    def empty(cls, kv_heads: int) -> "SequenceCache":
        """A cache that nothing was written to."""
        return cls(jnp.zeros((0, kv_heads, 0, 0)), jnp.zeros((0, kv_heads, 0, 0)))

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "SequenceCache":
        """As `Cache.write`: the rows are the slots, and they are filled at once."""
        return SequenceCache(k.swapaxes(1, 2), v.swapaxes(1, 2))

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
        """As `Cache.attend`, in float32."""
        return self.mix(self.weights(q, scale=scale, softcap=softcap, window=window, sinks=sinks))

    def weights(
        self,
        q: Float[Array, "B T N H"],
        *,
        scale: float,
        softcap: float | None,
        window: int | None,
        sinks: Float[Array, "N"] | None = None,
    ) -> Float[Array, "B N T T"]:
        """How much each query takes of each position: rows that add up to 1, or less beside a sink."""
        B, T, N, H = q.shape
        grouped = q.reshape(B, T, self.k.shape[1], -1, H)
        scores = product("btkgh,bksh->bkgts", grouped, self.k) * scale
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(_visible(T, window)[None, None, None], scores, HIDDEN)
        if sinks is not None:  # one more position, whose weight is then left out
            sink = jnp.broadcast_to(sinks.reshape(1, self.k.shape[1], -1, 1, 1), (*scores.shape[:-1], 1))
            scores = jnp.concatenate([scores, sink], axis=-1)
        return jax.nn.softmax(scores, axis=-1)[..., :T].reshape(B, N, T, T)

    def mix(self, weights: Float[Array, "B N T T"]) -> Float[Array, "B T N H"]:
        """The values, each as much as the weights say."""
        B, N, T, _ = weights.shape
        K, H = self.v.shape[1], self.v.shape[3]
        mixed = product("bkgts,bksh->btkgh", weights.reshape(B, K, N // K, T, T), self.v)
        return mixed.reshape(B, T, N, H)


def empty_sequence_caches(model: ModelConfig) -> tuple[LayerCache, ...]:
    """Caches that nothing was written to, one for each layer of a model with attention alone."""
    return tuple(
        SequenceCache.empty(model.of(kind).num_kv_heads) if kind.keys_of is None else NoCache()
        for kind in model.layers
    )


def _visible(T: int, window: int | None) -> Bool[Array, "T T"]:
    """Whether the query of a row sees the position of a column."""
    at = jnp.arange(T, dtype=jnp.int32)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)
