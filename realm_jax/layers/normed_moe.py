"""Experts beside a plain feed-forward layer."""

import flax.linen as nn
from jaxtyping import Array, Float

from realm_jax.config import ModelConfig
from realm_jax.layers.mlp import MLP, activated
from realm_jax.layers.moe import route
from realm_jax.layers.projection import Linear, Norm, weight


class NormedMoE(nn.Module):
    """Both read the residual, each with norms before and after; so does the router (Gemma 4, Google 2026)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, moe, D = self.config, self.config.moe, x.shape[-1]
        assert moe is not None
        logits = Linear(moe.num_experts, name="router")(self._norm("router_norm", x) * D**-0.5)
        chosen, share = route(logits, None, moe)
        if moe.has_scales:
            share = share * weight(self, "scales", (moe.num_experts,))[chosen]
        experts = weight(self, "experts", (moe.num_experts, D, moe.size))
        mixed = experts.mix(
            self._norm("experts_norm", x), chosen, share, lambda hidden: activated(hidden, c.activation)
        )
        plain = MLP(c.ffn_size, c.activation, name="plain")(self._norm("plain_norm", x))
        return self._norm("plain_post_norm", plain) + self._norm("experts_post_norm", mixed)

    def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return Norm(self.config.norm_eps, name=name)(x)
