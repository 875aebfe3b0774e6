"""A memory of fixed size in place of attention, as in Qwen3-Next and Qwen3.5.

Letters: B rows, T new tokens, D hidden, G key heads, H value heads, V their dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from realm_jax.config import DeltaNetConfig, ModelConfig
from realm_jax.delta_rule import Tokens, unit_length
from realm_jax.layers.projection import Linear, Norm, Where, weight
from realm_jax.recurrent_cache import RecurrentCache


class GatedDeltaNet(nn.Module):
    """The gated delta rule over convolved tokens (Yang, Kautz and Hatamizadeh 2024)."""

    config: ModelConfig
    net: DeltaNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], cache: RecurrentCache, where: Where
    ) -> tuple[Float[Array, "B T D"], RecurrentCache]:
        net, eps = self.net, self.config.norm_eps
        B, T, D = x.shape
        features = Linear(net.channels + net.values + 2 * net.value_heads, name="in")(x)
        mixed, gate, scalars = jnp.split(features, (net.channels, net.channels + net.values), axis=-1)
        rows = cache.rows(where.slots, where.positions, where.lengths)
        mixed, cache = cache.convolve(mixed, weight(self, "taps", (net.channels, net.taps)), rows)
        heads = nn.silu(mixed).reshape(B, T, -1, net.head_dim)
        q, k, v = jnp.split(heads, (net.key_heads, 2 * net.key_heads), axis=2)
        strength, decay = self._scalars(scalars)
        tokens = Tokens(
            net.head_dim**-0.5 * self._of_values(unit_length(q, eps)),
            self._of_values(unit_length(k, eps)),
            v,
            decay,
            strength,
        )
        read, cache = cache.extend(tokens, rows)
        read = Norm(eps, name="norm")(read) * nn.silu(gate.reshape(B, T, -1, net.head_dim))
        return Linear(D, name="out")(read.reshape(B, T, -1)), cache

    def _scalars(self, x: Float[Array, "B T twice_H"]) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """How strongly each token is written, and the logarithm of what it leaves of the memory.

        Where value heads are grouped, each group has first the one and then the other of all its heads.
        """
        net = self.net
        groups = net.key_heads if net.is_grouped else 1
        parts = x.reshape(*x.shape[:2], groups, 2, -1)
        strength, decay = (parts[..., i, :].reshape(*x.shape[:2], -1) for i in (0, 1))
        rate, bias = (weight(self, name, (net.value_heads,))[None, None] for name in ("rate", "rate_bias"))
        return nn.sigmoid(strength), rate * jax.nn.softplus(decay + bias)

    def _of_values(self, keys: Float[Array, "B T G V"]) -> Float[Array, "B T H V"]:
        """Each value head's key head."""
        times = self.net.value_heads // self.net.key_heads
        if self.net.is_grouped:
            return jnp.repeat(keys, times, axis=2)
        return jnp.tile(keys, (1, 1, times, 1))
