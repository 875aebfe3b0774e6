"""What activations mean in tokens: the logit lens, and log-probabilities.

L layers, B sequences, T tokens, D hidden, V vocabulary, A best tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.errors import RequestError
from realm_jax.llm import LLM
from realm_jax.model import Transformer, next_token_logits
from realm_jax.research.activations import Forward, require_observable
from realm_jax.weights import Params


def unembed(model: Transformer, params: Params, residual: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
    """The logits of a residual as if no layer followed: the model's last norm and head.

    A pure function, linear but for the norm and gemma2's soft cap.
    """
    require_observable(model)
    if residual.ndim == 0 or residual.shape[-1] != model.config.hidden_size:
        raise RequestError(
            f"the residual is {list(residual.shape)}; its last dimension must be {model.config.hidden_size}"
        )
    hidden: Any = model.apply({"params": params}, residual, method="normalized")
    return next_token_logits(model, params, hidden)


@struct.dataclass
class Lens:
    """The tokens that each layer would choose after each token."""

    ids: jax.Array  # [L, B, T, A] best first
    logprobs: jax.Array  # [L, B, T, A]
    of_next: jax.Array  # [L, B, T-1] the log-probability of the token that does follow
    entropy: jax.Array  # [L, B, T] nats


def logit_lens(llm: LLM, found: Forward, name: str = "resid_post", *, best: int = 5) -> Lens:
    """Each captured layer read by the model's own head (nostalgebraist 2020).

    The last layer's is the model's answer. No more than one layer's logits stand at once.
    Raises RequestError for what is no residual, or where `best` is not in the vocabulary's size.
    """
    if type(best) is not int or not 1 <= best <= llm.model.config.vocab_size:
        raise RequestError(f"best is {best}; give from 1 to {llm.model.config.vocab_size:,}")
    return _lens(llm.transformer, llm.model.params, found.layers(name), found.tokens, best)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _lens(model: Transformer, params: Params, residuals: Array, tokens: Array, best: int) -> Lens:
    def read(residual: Array) -> Lens:
        scores = jax.nn.log_softmax(unembed(model, params, residual), axis=-1)
        logprobs, ids = jax.lax.top_k(scores, best)
        entropy = jax.scipy.special.entr(jnp.exp(scores)).sum(axis=-1)
        return Lens(ids, logprobs, of_tokens(scores, tokens), entropy)

    return jax.lax.map(read, residuals)


def token_logprobs(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """The natural-log probability of each token but the first, given those before it."""
    return of_tokens(jax.nn.log_softmax(logits, axis=-1), tokens)


def of_tokens(scores: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    """What each row says of the token after it."""
    return jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
