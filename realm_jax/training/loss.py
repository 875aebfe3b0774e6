"""The cross-entropy of completions.

B rows, T tokens, D hidden, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from realm_jax.model import Transformer, hidden_states, next_token_logits
from realm_jax.sequence_cache import empty_sequence_caches
from realm_jax.weights import Params

LOGITS = 1 << 25
"""Logits that stand at once: 128 MB of them."""
LEAST = 64
"""Tokens of a chunk, where the vocabulary is huge."""


def summed_loss(
    model: Transformer, params: Params, tokens: Int[Array, "B T"], is_target: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """The negative log-probability of all targets together; a token is scored by those before it.

    A row's first token cannot be a target.
    """
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    hidden, _ = hidden_states(model, params, tokens, positions, empty_sequence_caches(model.config), None)
    hidden, targets = hidden[:, :-1].reshape(B * (T - 1), -1), tokens[:, 1:].reshape(-1)
    return _summed(model, params, hidden, targets, is_target[:, 1:].reshape(-1))


def _summed(
    model: Transformer,
    params: Params,
    hidden: Float[Array, "n D"],
    targets: Int[Array, "n"],
    wanted: Bool[Array, "n"],
) -> Float[Array, ""]:
    """Targets stand together at the front, in chunks; a chunk without any costs nothing."""
    n = hidden.shape[0]
    chunk = min(n, max(LEAST, LOGITS // model.config.vocab_size // LEAST * LEAST))
    order = jnp.argsort(~wanted, stable=True)
    order = jnp.pad(order, (0, -n % chunk)).reshape(-1, chunk)  # the rows that fill up are row 0, not counted
    counted = jnp.arange(order.size, dtype=jnp.int32).reshape(order.shape) < wanted.sum()

    @jax.checkpoint
    def scored(hidden: Array, targets: Array, counted: Array) -> Array:
        logits = next_token_logits(model, params, hidden)
        chosen = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return jnp.where(counted, jax.nn.logsumexp(logits, axis=-1) - chosen, 0.0).sum()

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        rows, counted = part
        loss = jax.lax.cond(
            counted[0], scored, lambda *_: jnp.float32(0), hidden[rows], targets[rows], counted
        )
        return total + loss, None

    return jax.lax.scan(add, jnp.float32(0), (order, counted))[0]
