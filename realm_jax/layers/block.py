"""One layer of a transformer."""

import flax.linen as nn
from jaxtyping import Array, Float

from realm_jax.cache import LayerCache
from realm_jax.config import LayerKind, ModelConfig
from realm_jax.layers.attention import Attention
from realm_jax.layers.delta_net import GatedDeltaNet
from realm_jax.layers.gated_attention import GatedAttention
from realm_jax.layers.latent_attention import LatentAttention
from realm_jax.layers.layer_input import LayerInput
from realm_jax.layers.mlp import MLP
from realm_jax.layers.moe import MoE
from realm_jax.layers.normed_moe import NormedMoE
from realm_jax.layers.projection import HookPoint, Norm, Where, weight
from realm_jax.layers.shared_attention import SharedAttention


class Block(nn.Module):
    """A mixer of tokens and feed-forward, each around a residual, one after the other or side by side."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: LayerCache, where: Where
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        c = self.config
        normed = self._norm("attention_norm", x) if c.pre_norms else x
        mixed, cache = self._mixer()(normed, cache, where)
        if c.parallel:
            fed = self._feed_forward(normed if c.shared_norm else self._norm("mlp_norm", x))
            return x + (mixed + fed) * c.residual_scale, cache
        x = HookPoint(name="resid_mid")(self._added(x, mixed, "attention_post_norm"))
        fed = self._feed_forward(self._norm("mlp_norm", x) if c.has_mlp_norm else x)
        x = self._added(x, fed, "mlp_post_norm")
        if where.inputs is not None:
            x = x + LayerInput(c, name="layer_input")(x, where.inputs)
        return (x * weight(self, "output_scale", (1,))[0] if c.output_scales else x), cache

    def _mixer(self) -> nn.Module:
        """What lets tokens see those before them."""
        c, kind = self.config.of(self.kind), self.kind
        if kind.delta_net is not None:
            return GatedDeltaNet(c, kind.delta_net, name="delta_net")
        if kind.keys_of is not None:
            return SharedAttention(c, kind, name="attention")
        attention = GatedAttention if kind.is_gated else Attention if c.latent is None else LatentAttention
        return attention(c, kind, name="attention")

    def _norm(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return Norm(self.config.norm_eps, name=name)(x)

    def _feed_forward(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c = self.config.of(self.kind)
        if c.moe is None or self.kind.dense:
            return MLP(c.ffn_size, c.activation, name="mlp")(x)
        return (NormedMoE if c.moe.is_beside else MoE)(c, name="mlp")(x)

    def _added(
        self, x: Float[Array, "B T D"], change: Float[Array, "B T D"], norm: str
    ) -> Float[Array, "B T D"]:
        c = self.config
        change = self._norm(norm, change) if c.post_norms else change
        return x + change * c.residual_scale
