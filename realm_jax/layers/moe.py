"""Mixture of experts: each token goes through those that a router picks for it.

Letters: B rows, T new tokens, D hidden, E experts, A chosen, G groups.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from realm_jax.config import ModelConfig, MoEConfig
from realm_jax.kernels import row_sum
from realm_jax.layers.mlp import MLP, activated
from realm_jax.layers.projection import Linear, weight

HIDDEN = -1e30
"""The score of an expert that cannot be chosen."""


class MoE(nn.Module):
    """The best experts of each token, weighted, and the shared one.

    A row's bits do not depend on what the others chose.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, moe = self.config, self.config.moe
        assert moe is not None
        logits = Linear(moe.num_experts, name="router")(x)
        bias = weight(self, "bias", (moe.num_experts,)) if moe.has_bias else None
        chosen, share = route(logits, bias, moe)
        experts = weight(self, "experts", (moe.num_experts, x.shape[-1], moe.size))
        out = experts.mix(x, chosen, share, lambda hidden: activated(hidden, c.activation))
        if not moe.shared_size:
            return out
        shared = MLP(moe.shared_size, c.activation, name="shared")(x)
        if moe.gated_shared:
            gate = weight(self, "shared_gate", x.shape[-1:])
            shared = nn.sigmoid(row_sum(x * jnp.broadcast_to(gate, x.shape)))[..., None] * shared
        return out + shared


def route(
    logits: Float[Array, "B T E"], bias: Float[Array, "E"] | None, moe: MoEConfig
) -> tuple[Int[Array, "B T A"], Float[Array, "B T A"]]:
    """The experts that each token goes through, and what each one's output is multiplied by.

    Softmax: Mixtral (Jiang et al. 2024); sigmoid, bias and groups: DeepSeek-V3 (DeepSeek-AI 2024).
    """
    if moe.scores == "softmax":
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        scores = weights / row_sum(weights)[..., None]
    else:
        scores = nn.sigmoid(logits)
    ranked = scores if bias is None else scores + jnp.broadcast_to(bias, scores.shape)
    if moe.groups is not None:
        ranked = _of_best_groups(ranked, *moe.groups)
    _, chosen = jax.lax.top_k(ranked, moe.num_used)
    share = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.renormalize:
        share = share / jnp.maximum(row_sum(share), 2.0**-14)[..., None]  # as in float16
    return chosen, share * moe.scale


def _of_best_groups(scores: Float[Array, "B T E"], groups: int, used: int) -> Float[Array, "B T E"]:
    """The scores within the best groups; a group is as good as its two best experts together."""
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    best, _ = jax.lax.top_k(grouped, 2)
    _, kept = jax.lax.top_k(best[..., 0] + best[..., 1], used)
    is_kept = jax.nn.one_hot(kept, groups, dtype=bool).any(axis=-2)
    return jnp.where(is_kept[..., None], grouped, HIDDEN).reshape(scores.shape)
