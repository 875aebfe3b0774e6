"""The Transformer: tokens and caches in, hidden states and caches out."""

import functools
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.cache import LayerCache, empty_caches
from realm_jax.config import ModelConfig, Numerics
from realm_jax.layers import Block, LayerInputs, Norm, Where

Caches = tuple[LayerCache, ...]  # one a layer: a single stacked array would be copied whole at each step


class Transformer(nn.Module):
    """Every dense, mixture-of-experts and hybrid family, through the switches of `ModelConfig`.

    block: the kind of a layer's module; training may choose one that keeps less for the backward pass.
    """

    config: ModelConfig
    block: type[Block] = Block

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        caches: Caches,
        slots: Int[Array, "B"] | None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """Hidden states after the last norm; each row's keys and values stand in its slot's cache.

        slots: None where row b is slot b. A row whose positions are at or past the capacity, or whose
        slot is past the last, leaves nothing behind. lengths: how many tokens of each row are real, the
        first ones; None: all. Rows of one slot stand in order, each at one position after the other.
        """
        c = self.config
        x = self.get_variable("params", "embedding").rows(tokens) * c.embedding_scale
        if c.learned_positions:
            x = x + self.get_variable("params", "positions").rows(
                jnp.minimum(positions, c.context_length - 1)
            )
        ropes = self.get_variable("params", "rope")
        turns = {name: rope.at(positions) for name, rope in ropes.items()}
        where = Where(slots, positions, turns, lengths)
        inputs = self._layer_inputs(x, tokens)
        written = []
        for i, (kind, cache) in enumerate(zip(c.layers, caches, strict=True)):
            block, here = self.block(c, kind, parent=None), replace(where, inputs=inputs[i])
            seen = cache if kind.keys_of is None else written[kind.keys_of]
            x, new = self.layer(i, block, self.get_variable("params", f"layer_{i}"), x, seen, here)
            written.append(new if kind.keys_of is None else cache)
        return self.normalized(x), tuple(written)

    def _layer_inputs(self, x: Float[Array, "B T D"], tokens: Int[Array, "B T"]) -> Any:
        """What each layer is told beside the residual: [B, T, P], or None."""
        c = self.config
        if not c.layer_input_size:
            return [None] * c.num_layers
        params = self.get_variable("params", "token_inputs")
        return LayerInputs(c, parent=None).apply({"params": params}, x, tokens)

    @nn.nowrap
    def layer(
        self, index: int, block: Block, params: Any, x: Array, cache: LayerCache, where: Where
    ) -> tuple[Array, LayerCache]:
        """What the layer of this index makes of x; research sees and changes what goes through it here."""
        return _apply_block(block, params, x, cache, where)

    def normalized(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """What the last block gave, after the last norm."""
        norm = Norm(self.config.norm_eps, parent=None)
        return norm.apply({"params": self.get_variable("params", "norm")}, x)  # pyright: ignore[reportReturnType]

    def logits(self, hidden: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
        """Scores of the next token, float32."""
        scores = hidden @ self.get_variable("params", "head") * self.config.logit_scale
        cap = self.config.logit_softcap
        return scores if cap is None else cap * jnp.tanh(scores / cap)

    def empty_caches(self, slots: int, capacity: int, numerics: Numerics) -> Caches:
        """Caches of `slots` empty slots, one a layer."""
        return empty_caches(self.config, slots, capacity, numerics)


def hidden_states(
    model: Transformer,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    caches: Caches,
    slots: Int[Array, "B"] | None,
    lengths: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B T D"], Caches]:
    """The model called with its params."""
    return model.apply({"params": params}, tokens, positions, caches, slots, lengths)  # pyright: ignore[reportReturnType]


def next_token_logits(
    model: Transformer, params: Any, hidden: Float[Array, "*lead D"]
) -> Float[Array, "*lead V"]:
    """The model's head with its params."""
    return model.apply({"params": params}, hidden, method="logits")  # pyright: ignore[reportReturnType]


@functools.partial(jax.jit, static_argnums=0)
def _apply_block(
    block: Block, params: Any, x: Array, cache: LayerCache, where: Where
) -> tuple[Array, LayerCache]:
    """The block, traced once for all layers of its kind rather than once a layer."""
    return block.apply({"params": params}, x, cache, where)  # pyright: ignore[reportReturnType]
