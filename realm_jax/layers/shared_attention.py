"""Attention over the keys and values of an earlier layer, which has written them by then."""

import flax.linen as nn
from jaxtyping import Array, Float

from realm_jax.cache import Cache
from realm_jax.config import LayerKind, ModelConfig
from realm_jax.layers.projection import Linear, Norm, Where, scoring


class SharedAttention(nn.Module):
    """Queries alone (cross-layer attention, Brandon et al. 2024)."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache]:
        c, kind = self.config, self.kind
        q = Linear(c.num_heads * c.head_dim, name="q_proj")(x).reshape(*x.shape[:2], c.num_heads, c.head_dim)
        q = where.rotations[kind.rope](Norm(c.norm_eps, name="q_norm")(q))
        out = cache.attend(q, where.slots, where.positions, **scoring(c, kind))
        return Linear(x.shape[-1], name="out")(out.reshape(*x.shape[:2], -1)), cache
