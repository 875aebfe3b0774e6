"""What a layer is told of the tokens beside the residual: embeddings of its own (Gemma 3n, Google 2025).

Letters: B rows, T new tokens, D hidden, L layers, P features of a layer's input.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.config import ModelConfig
from realm_jax.layers.projection import Linear, Norm


class LayerInputs(nn.Module):
    """What all layers are told: a token's own features for each, and what the first residual says to it."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Float[Array, "L B T P"]:
        c = self.config
        shape = (*tokens.shape, c.num_layers, c.layer_input_size)
        own = self.get_variable("params", "embedding").rows(tokens).reshape(shape)
        said = Linear(c.num_layers * c.layer_input_size, name="project")(x) * c.hidden_size**-0.5
        said = Norm(c.norm_eps, name="norm")(said.reshape(shape))
        return jnp.moveaxis((said + own * c.layer_input_size**0.5) * 2**-0.5, 2, 0)


class LayerInput(nn.Module):
    """What a layer makes of its input, gated by the residual."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], told: Float[Array, "B T P"]) -> Float[Array, "B T D"]:
        gate = nn.gelu(Linear(told.shape[-1], name="gate")(x), approximate=True)
        return Norm(self.config.norm_eps, name="norm")(Linear(x.shape[-1], name="out")(gate * told))
