"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024), in the form that never expands the cache.

Each token leaves one latent vector and one turned key, which all heads share: to the cache that is one kv
head. Queries are brought into the latent space and values out of it by a matrix for each head.
Letters: B rows, T new tokens, D hidden, N heads.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from realm_jax.cache import Cache
from realm_jax.config import LayerKind, ModelConfig
from realm_jax.layers.projection import Linear, Norm, Where, scoring, weight


class LatentAttention(nn.Module):
    """Attention whose one key and value is the latent vector, after the turned dimensions."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache]:
        c, latent = self.config, self.config.latent
        assert latent is not None
        B, T, D = x.shape
        plain, turned = jnp.split(self._queries(x), (latent.plain_dim,), axis=-1)
        inner = plain @ weight(self, "k_up", (c.num_heads, latent.plain_dim, latent.rank))
        vector, key = jnp.split(Linear(c.head_dim, name="kv_down")(x), (latent.rank,), axis=-1)
        vector = Norm(c.norm_eps, name="kv_norm")(vector)
        one = jnp.stack(
            [jnp.concatenate([each, vector], axis=-1) for each in (key, jnp.zeros_like(key))], axis=2
        )
        heads = jnp.concatenate([jnp.concatenate([turned, inner], axis=-1), one], axis=2)
        turn = where.rotations[self.kind.rope]
        out, cache = cache.extend(heads, turn, where.slots, where.positions, **scoring(c, self.kind))
        mixed = out[..., latent.rope_dim :]
        values = mixed @ weight(self, "v_up", (c.num_heads, latent.rank, latent.value_dim))
        return Linear(D, name="out")(values.reshape(B, T, -1)), cache

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N dims"]:
        c, latent = self.config, self.config.latent
        assert latent is not None
        if latent.query_rank:
            x = Norm(c.norm_eps, name="q_norm")(Linear(latent.query_rank, name="q_down")(x))
        heads = Linear(c.num_heads * (latent.plain_dim + latent.rope_dim), name="q_proj")(x)
        return heads.reshape(*x.shape[:2], c.num_heads, -1)
