"""The decode state of a recurrent layer: of each slot a memory and the inputs of a short convolution.

It is a slot's and not a token's, so it can be neither cut back nor shared in part. S slots, B rows, T
tokens, C channels, N taps, H heads, K key dim, V value dim.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from realm_jax import delta_rule
from realm_jax.config import DeltaNetConfig, ModelConfig
from realm_jax.delta_rule import Tile, Tokens


@struct.dataclass
class Rows:
    """Which slot each row of a call continues, and with how many tokens.

    Rows of one slot stand in order. A row that leaves nothing behind has no real tokens.
    """

    slots: jax.Array | None  # [B] the last slot where a row has none; None: row b is slot b
    is_new: jax.Array  # [B] whether a sequence begins
    lengths: jax.Array  # [B] tokens that are real, the first ones of the row


@struct.dataclass
class RecurrentCache:
    """What a layer remembers of each slot. The values of a slot that no sequence has are garbage."""

    inputs: jax.Array  # [S, N - 1, C] the last ones of the convolution
    memory: jax.Array  # [S, H, K, V]
    capacity: int = struct.field(pytree_node=False)  # tokens of a slot, as of the attention caches

    @classmethod
    def empty(cls, slots: int, capacity: int, net: DeltaNetConfig) -> "RecurrentCache":
        """The cache of slots of which none was used."""
        memory = (slots, net.value_heads, net.head_dim, net.head_dim)
        return cls(jnp.zeros((slots, net.taps - 1, net.channels)), jnp.zeros(memory), capacity)

    def rows(self, slots: Array | None, positions: Array, lengths: Array | None) -> Rows:
        """The rows at these positions [B, T], each at one after the other. lengths: None = all are real."""
        S = self.memory.shape[0]
        start, T = positions[:, 0], positions.shape[1]
        real = jnp.minimum(T if lengths is None else lengths, self.capacity - start)
        if slots is not None:
            real = jnp.where(slots < S, real, 0)
            slots = jnp.minimum(slots, S - 1)
        return Rows(slots, start == 0, jnp.maximum(real, 0))

    def convolve(
        self, x: Float[Array, "B T C"], taps: Float[Array, "C N"], rows: Rows
    ) -> "tuple[Float[Array, 'B T C'], RecurrentCache]":
        """The causal convolution of each channel, over what the slot had before."""
        size = taps.shape[1] - 1

        def follow(before: Array, length: Array, x: Array) -> tuple[Array, Array]:
            window = jnp.concatenate([before, x])
            return jax.lax.dynamic_slice_in_dim(window, length, size), window

        inputs, windows = _each(self.inputs, rows, follow, x)
        return delta_rule.window_sum(windows, taps), replace(self, inputs=inputs)

    def extend(self, tokens: Tokens, rows: Rows) -> "tuple[Float[Array, 'B T H V'], RecurrentCache]":
        """What each token reads of its slot's memory once it and those before it are written there."""
        T = tokens.value.shape[1]
        real = (jnp.arange(T, dtype=jnp.int32)[None] < rows.lengths[:, None])[..., None]
        tokens = replace(
            tokens,
            decay=jnp.where(real, tokens.decay, 0.0),
            strength=jnp.where(real, tokens.strength, 0.0),
        )
        if rows.slots is None and T == 1:
            B = tokens.value.shape[0]
            before = jnp.where(rows.is_new[:, None, None, None], 0.0, self.memory[:B])
            memory, out = delta_rule.step(tokens, before)
            return out, replace(self, memory=self.memory.at[:B].set(memory))

        def follow(before: Array, length: Array, tile: Tile) -> tuple[Array, Array]:
            return delta_rule.through(tile, before)

        memory, out = _each(self.memory, rows, follow, delta_rule.prepare(tokens))
        return out.swapaxes(1, 2), replace(self, memory=memory)  # pyright: ignore[reportReturnType]


def _each(
    state: Array, rows: Rows, follow: Callable[[Array, Array, Any], tuple[Array, Array]], given: Any
) -> tuple[Array, Array]:
    """Row after row: what follows from its slot's state, its length and what is given of it.

    A row without real tokens leaves its slot's state alone.
    """
    count = rows.lengths.shape[0]
    slots = jnp.arange(count, dtype=jnp.int32) if rows.slots is None else rows.slots

    def one(state: Array, row: Any) -> tuple[Array, Array]:
        slot, is_new, length, mine = row
        kept = jax.lax.dynamic_index_in_dim(state, slot, keepdims=False)
        after, out = follow(jnp.where(is_new, 0.0, kept), length, mine)
        after = jnp.where(length > 0, after, kept)
        return jax.lax.dynamic_update_index_in_dim(state, after, slot, 0), out

    return jax.lax.scan(one, state, (slots, rows.is_new, rows.lengths, given))


def state_bytes(model: ModelConfig) -> int:
    """Bytes that the recurrent layers keep of one slot, whatever it holds."""
    nets = [kind.delta_net for kind in model.layers if kind.delta_net is not None]
    return sum(4 * ((n.taps - 1) * n.channels + n.value_heads * n.head_dim**2) for n in nets)
