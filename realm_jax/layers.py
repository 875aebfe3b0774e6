"""The layers of a transformer, as mathematics over weight nodes.

Letters: B rows, T new tokens, S slots, C cache capacity, D hidden, N query heads, K kv heads, H head dim,
F feed-forward, E experts, V vocabulary, P rotated pairs. Activations are float32; a kernel rounds its
inputs to its own type.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from realm_jax.cache import Cache
from realm_jax.config import Activation, LayerKind, ModelConfig
from realm_jax.kernels import row_sum
from realm_jax.nodes import Rotation

ACTIVATIONS = {
    Activation.SILU: nn.silu,
    Activation.GELU: lambda x: nn.gelu(x, approximate=True),
}


@struct.dataclass
class Where:
    """Which slots and positions the tokens of a call belong to, and their turns by rope name."""

    slots: jax.Array | None  # [B]; None: row b is slot b
    positions: jax.Array  # [B, T] absolute
    rotations: dict[str, Rotation]
    lengths: jax.Array | None = None  # [B] tokens of each row that are real; None: all, up to the capacity


def weight(module: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
    """The node called `name` of this module, its logical shape checked."""
    node = module.get_variable("params", name)
    if tuple(node.shape) != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"{path} is {tuple(node.shape)}; the model needs {shape}")
    return node


class Linear(nn.Module):
    """A projection to `features` outputs."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return x @ weight(self, "kernel", (x.shape[-1], self.features))


class RMSNorm(nn.Module):
    """Rows scaled to root mean square 1, then by a learned weight (Zhang and Sennrich 2019)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return weight(self, "scale", x.shape[-1:]).rms_norm(x, self.eps)


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
        if c.qk_norm:
            q, k, v = jnp.split(heads, (c.num_heads, c.num_heads + c.num_kv_heads), axis=2)
            q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
            heads = jnp.concatenate([q, k, v], axis=2)
        out, cache = cache.extend(
            heads,
            where.rotations[self.kind.rope],
            where.slots,
            where.positions,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            window=self.kind.window,
        )
        return Linear(D, name="out")(out.reshape(B, T, -1)), cache


class MLP(nn.Module):
    """The gated feed-forward layer (Shazeer 2020)."""

    features: int
    activation: Activation

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        hidden = Linear(2 * self.features, name="gate_up")(x)
        return Linear(x.shape[-1], name="down")(gated(hidden, self.activation))


def gated(gate_up: Float[Array, "*lead twice_F"], activation: Activation) -> Float[Array, "*lead F"]:
    """The second half of the features, let through as the first half says."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return ACTIVATIONS[activation](gate) * up


class MoE(nn.Module):
    """Each token's best experts, weighted by the renormalized router (Mixtral, Jiang et al. 2024).

    A row's bits do not depend on what the others chose.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, moe = self.config, self.config.moe
        assert moe is not None
        logits = Linear(moe.num_experts, name="router")(x)
        best, chosen = jax.lax.top_k(logits, moe.num_used)
        share = jnp.exp(best - best[..., :1])  # softmax over all experts, renormalized: the same
        share = share / row_sum(share)[..., None]
        experts = weight(self, "experts", (moe.num_experts, x.shape[-1], c.ffn_size))
        return experts.mix(x, chosen, share, lambda hidden: gated(hidden, c.activation))


class Block(nn.Module):
    """One layer: a mixer of tokens and feed-forward, each around a residual."""

    config: ModelConfig
    kind: LayerKind

    def mixer(self) -> nn.Module:
        """What lets tokens see those before them."""
        return Attention(self.config, self.kind, name="attention")

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Any, where: Where
    ) -> tuple[Float[Array, "B T D"], Any]:
        c = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c.norm_eps, name=name)

        mixed, cache = self.mixer()(norm("attention_norm")(x), cache, where)
        x = x + (norm("attention_post_norm")(mixed) if c.post_norms else mixed)
        feed_forward = MoE(c, name="mlp") if c.moe else MLP(c.ffn_size, c.activation, name="mlp")
        fed = feed_forward(norm("mlp_norm")(x))
        return x + (norm("mlp_post_norm")(fed) if c.post_norms else fed), cache
