"""Attention of heads that have keys and values of their own, or share them."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.cache import Cache
from realm_jax.config import LayerKind, ModelConfig, QKNorm, Temperature
from realm_jax.layers.projection import Linear, Norm, Where, weight


class Attention(nn.Module):
    """Grouped-query attention over the slot cache."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache]:
        c = self.config
        B, T, D = x.shape
        heads = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, name="qkv")(x)
        heads = heads.reshape(B, T, -1, c.head_dim)
        if c.qk_norm is not QKNorm.NONE:
            q, k, v = jnp.split(heads, (c.num_heads, c.num_heads + c.num_kv_heads), axis=2)
            heads = jnp.concatenate([self._normed(q, "q_norm"), self._normed(k, "k_norm"), v], axis=2)
        if c.temperature is not None:
            q, kv = jnp.split(heads, (c.num_heads,), axis=2)
            heads = jnp.concatenate([q * query_scale(where.positions, c.temperature), kv], axis=2)
        out, cache = cache.extend(
            heads,
            where.rotations[self.kind.rope],
            where.slots,
            where.positions,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            window=self.kind.window,
            **({"sinks": weight(self, "sinks", (c.num_heads,))} if c.sinks else {}),
        )
        return Linear(D, name="out")(out.reshape(B, T, -1)), cache

    def _normed(self, heads: Float[Array, "B T N H"], name: str) -> Float[Array, "B T N H"]:
        is_by_head = self.config.qk_norm is QKNorm.HEAD
        rows = heads if is_by_head else heads.reshape(*heads.shape[:2], -1)
        return Norm(self.config.norm_eps, name=name)(rows).reshape(heads.shape)


def query_scale(positions: Int[Array, "B T"], temperature: Temperature) -> Float[Array, "B T 1 1"]:
    """What queries at these positions are multiplied by (Llama 4's attention temperature, Meta 2025)."""
    periods = (positions // temperature.length + 1).astype(jnp.float32)
    return (1.0 + temperature.scale * jnp.log(periods))[..., None, None]
