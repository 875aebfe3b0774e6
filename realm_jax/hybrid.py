"""The mixers of hybrid models (Qwen3-Next, Qwen3.5): gated delta nets, and attention with an output gate.

Letters as in `layers`; H value heads of a delta net, V their dim.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from realm_jax.cache import Cache
from realm_jax.config import DeltaNetConfig, LayerKind, ModelConfig
from realm_jax.delta_rule import Tokens, unit_length
from realm_jax.layers import Block, Linear, RMSNorm, Where, weight
from realm_jax.recurrent_cache import RecurrentCache


class GatedDeltaNet(nn.Module):
    """A memory of fixed size in place of attention (Yang, Kautz and Hatamizadeh 2024)."""

    config: ModelConfig
    net: DeltaNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: RecurrentCache, where: Where
    ) -> tuple[Float[Array, "B T D"], RecurrentCache]:
        net, eps = self.net, self.config.norm_eps
        B, T, D = x.shape
        sizes = (net.channels, net.values, net.value_heads, net.value_heads)
        ends = tuple(sum(sizes[: i + 1]) for i in range(3))
        mixed, gate, strength, decay = jnp.split(Linear(sum(sizes), name="in")(x), ends, axis=-1)
        rows = cache.rows(where.slots, where.positions, where.lengths)
        taps = weight(self, "taps", (net.channels, net.taps)).weight
        mixed, cache = cache.convolve(mixed, taps, rows)
        heads = nn.silu(mixed).reshape(B, T, -1, net.head_dim)
        q, k, v = jnp.split(heads, (net.key_heads, 2 * net.key_heads), axis=2)
        rate = weight(self, "rate", (net.value_heads,)).weight
        bias = weight(self, "rate_bias", (net.value_heads,)).weight
        tokens = Tokens(
            net.head_dim**-0.5 * self._of_values(unit_length(q, eps)),
            self._of_values(unit_length(k, eps)),
            v,
            rate[None, None] * jax.nn.softplus(decay + bias[None, None]),
            jax.nn.sigmoid(strength),
        )
        read, cache = cache.extend(tokens, rows)
        read = RMSNorm(eps, name="norm")(read) * nn.silu(gate.reshape(B, T, -1, net.head_dim))
        return Linear(D, name="out")(read.reshape(B, T, -1)), cache

    def _of_values(self, keys: Float[Array, "B T G V"]) -> Float[Array, "B T H V"]:
        """Each value head's key head."""
        times = self.net.value_heads // self.net.key_heads
        if self.net.is_grouped:
            return jnp.repeat(keys, times, axis=2)
        return jnp.tile(keys, (1, 1, times, 1))


class GatedAttention(nn.Module):
    """Attention whose output each head's gate lets through (Qiu et al. 2025)."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: Cache, where: Where
    ) -> tuple[Float[Array, "B T D"], Cache]:
        c = self.config
        B, T, D = x.shape
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        heads = Linear(2 * (N + K) * H, name="qkv")(x).reshape(B, T, -1, H)
        q, gate = heads[:, :, : 2 * N : 2], heads[:, :, 1 : 2 * N : 2]
        k, v = heads[:, :, 2 * N : 2 * N + K], heads[:, :, 2 * N + K :]
        q, k = RMSNorm(c.norm_eps, name="q_norm")(q), RMSNorm(c.norm_eps, name="k_norm")(k)
        out, cache = cache.extend(
            jnp.concatenate([q, k, v], axis=2),
            where.rotations[self.kind.rope],
            where.slots,
            where.positions,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            window=self.kind.window,
        )
        return Linear(D, name="out")((out * jax.nn.sigmoid(gate)).reshape(B, T, -1)), cache


class HybridBlock(Block):
    """A layer whose mixer is its kind's."""

    def mixer(self) -> nn.Module:
        """A gated delta net, gated attention, or plain attention."""
        if self.kind.delta_net is not None:
            return GatedDeltaNet(self.config, self.kind.delta_net, name="delta_net")
        if self.kind.is_gated:
            return GatedAttention(self.config, self.kind, name="attention")
        return super().mixer()
