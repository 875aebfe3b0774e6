"""Attention of heads that have keys and values of their own, or share them."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.cache import Cache
from realm_jax.config import LayerKind, ModelConfig, QKNorm, Temperature
from realm_jax.kernels import rms_norm
from realm_jax.layers.projection import Linear, Norm, Where, scoring, weight


class Attention(nn.Module):
    """Grouped-query attention over the slot cache."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache]:
        c, kind = self.config, self.kind
        heads, how = self._projected(x), scoring(c, kind)
        if c.qk_norm is not QKNorm.NONE or c.unit_values:
            q, k, v = jnp.split(heads, (c.num_heads, c.num_heads + c.num_kv_heads), axis=2)
            v = rms_norm(v, jnp.ones(c.head_dim), c.norm_eps) if c.unit_values else v
            heads = jnp.concatenate([self._normed(q, "q_norm"), self._normed(k, "k_norm"), v], axis=2)
        if c.temperature is not None:
            q, kv = jnp.split(heads, (c.num_heads,), axis=2)
            heads = jnp.concatenate([q * query_scale(where.positions, c.temperature), kv], axis=2)
        if c.sinks:
            how["sinks"] = weight(self, "sinks", (c.num_heads,))
        turn = where.rotations[kind.rope]
        out, cache = cache.extend(heads, turn, where.slots, where.positions, **how)
        return Linear(x.shape[-1], name="out")(out.reshape(*x.shape[:2], -1)), cache

    def _projected(self, x: Float[Array, "B T D"]) -> Float[Array, "B T heads H"]:
        """Queries, keys, values."""
        c = self.config
        kinds = 1 if self.kind.values_are_keys else 2
        heads = Linear((c.num_heads + kinds * c.num_kv_heads) * c.head_dim, name="qkv")(x)
        heads = heads.reshape(*x.shape[:2], -1, c.head_dim)
        if self.kind.values_are_keys:
            heads = jnp.concatenate([heads, heads[:, :, c.num_heads :]], axis=2)
        return heads

    def _normed(self, heads: Float[Array, "B T N H"], name: str) -> Float[Array, "B T N H"]:
        c = self.config
        if c.qk_norm is QKNorm.NONE:
            return heads
        rows = heads.reshape(*heads.shape[:2], -1) if c.qk_norm is QKNorm.PROJECTION else heads
        axes = 2 if c.qk_norm is QKNorm.EACH_HEAD else 1
        return Norm(c.norm_eps, axes, name=name)(rows).reshape(heads.shape)


def query_scale(positions: Int[Array, "B T"], temperature: Temperature) -> Float[Array, "B T 1 1"]:
    """What queries at these positions are multiplied by (Llama 4's attention temperature, Meta 2025)."""
    periods = (positions // temperature.length + 1).astype(jnp.float32)
    return (1.0 + temperature.scale * jnp.log(periods))[..., None, None]
