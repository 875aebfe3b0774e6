"""The feed-forward layer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from realm_jax.config import Activation
from realm_jax.layers.projection import Linear

LIMIT, SLOPE = 7.0, 1.702
"""Of gpt-oss's activation (OpenAI 2025)."""


class MLP(nn.Module):
    """The feed-forward layer, gated where its activation takes two."""

    features: int
    activation: Activation

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        if self.activation.is_gated:
            hidden = Linear(2 * self.features, name="gate_up")(x)
        else:
            hidden = Linear(self.features, name="up")(x)
        return Linear(x.shape[-1], name="down")(activated(hidden, self.activation))


def activated(hidden: Float[Array, "*lead features"], activation: Activation) -> Float[Array, "*lead F"]:
    """What goes on to the second projection; of gated ones the first half of the features is the gate."""
    if activation is Activation.GELU:
        return nn.gelu(hidden, approximate=True)
    gate, up = jnp.split(hidden, 2, axis=-1)
    match activation:
        case Activation.SWIGLU:
            return nn.silu(gate) * up
        case Activation.GEGLU:
            return nn.gelu(gate, approximate=True) * up
        case Activation.CLAMPED_SWIGLU:
            gate, up = jnp.minimum(gate, LIMIT), jnp.clip(up, -LIMIT, LIMIT)
            return gate * nn.sigmoid(SLOPE * gate) * (up + 1.0)
