"""Attention whose output passes a gate."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from realm_jax.cache import Cache
from realm_jax.config import LayerKind, ModelConfig
from realm_jax.layers.projection import Linear, Norm, Where, scoring


class GatedAttention(nn.Module):
    """Grouped-query attention with a gate for each feature of its output (Qiu et al. 2025).

    A head's gate stands after its query.
    """

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache]:
        c = self.config
        B, T, D = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        heads = Linear(2 * (N + K) * H, name="qkv")(x).reshape(B, T, -1, H)
        q, gate = heads[:, :, : 2 * N : 2], heads[:, :, 1 : 2 * N : 2]
        k, v = heads[:, :, 2 * N : 2 * N + K], heads[:, :, 2 * N + K :]
        q, k = Norm(c.norm_eps, name="q_norm")(q), Norm(c.norm_eps, name="k_norm")(k)
        heads, turn = jnp.concatenate([q, k, v], axis=2), where.rotations[self.kind.rope]
        out, cache = cache.extend(heads, turn, where.slots, where.positions, **scoring(c, self.kind))
        return Linear(D, name="out")((out * nn.sigmoid(gate)).reshape(B, T, -1)), cache
