"""The layers of a transformer, as mathematics over weight nodes.

Letters: B rows, T new tokens, S slots, C cache capacity, D hidden, N query heads, K kv heads, H head dim,
F feed-forward, E experts, V vocabulary, P rotated pairs. Activations are float32; a kernel rounds its
inputs to its own type.
"""

from realm_jax.layers.block import Block
from realm_jax.layers.layer_input import LayerInputs
from realm_jax.layers.projection import Norm, Where

__all__ = ["Block", "LayerInputs", "Norm", "Where"]
