"""The model as a function: logits, and activations by name, of whole sequences.

B sequences, T tokens, D hidden, N query heads, K kv heads, H head dim, F feed-forward, V vocabulary.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.llm import LLM
from realm_jax.model import Transformer, hidden_states, next_token_logits
from realm_jax.parallel import ShardedTransformer
from realm_jax.prompts import Prompt, as_batch
from realm_jax.research.observed import observed
from realm_jax.research.probe import Probe, as_tree, asked
from realm_jax.sequence_cache import empty_sequence_caches
from realm_jax.weights import Params


@struct.dataclass
class Forward:
    """What a run of the model gave: `found.logits`, `found["layers.3.resid_post"]`."""

    tokens: jax.Array  # [B, T]
    lengths: jax.Array  # [B] so many of them are the sequence's; the rest fills up
    logits: jax.Array  # [B, T, V] row t scores the token that follows the first t + 1
    activations: dict[str, jax.Array]  # as captured, each [B, T, ...], weights of attention [B, N, T, T]

    def __getitem__(self, name: str) -> Array:
        """The activation. Raises RequestError for one that was not captured."""
        if name not in self.activations:
            raise RequestError(f"{name!r} was not captured; give capture=[{name!r}]")
        return self.activations[name]

    def layers(self, name: str) -> Array:
        """The activation of every layer that it was captured of, in their order: [L, B, T, ...].

        name: as within a layer, such as resid_post.
        """
        whole = re.compile(rf"layers\.(\d+)\.{re.escape(name)}")
        found = {int(m[1]): x for at, x in self.activations.items() if (m := whole.fullmatch(at))}
        if not found:
            raise RequestError(f"{name!r} was not captured of any layer; give capture=['layers.*.{name}']")
        return jnp.stack([found[layer] for layer in sorted(found)])

    def last(self, name: str) -> Array:
        """The activation at each sequence's last token, [B, ...]; of weights of attention, [B, N, T]."""
        x, axis = self[name], 2 if name.endswith("attention.weights") else 1
        at = (self.lengths - 1).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.take_along_axis(x, at, axis=axis).squeeze(axis)


def forward(
    model: Transformer,
    params: Params,
    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"],
    *,
    capture: Sequence[str] = (),
    edit: Mapping[str, Any] | None = None,
) -> Forward:
    """Logits of the sequences, and the activations that the names of `capture` match.

        found = forward(llm.transformer, llm.model.params, tokens, capture=["layers.*.resid_post"])

    edit: by name, a function of an activation to what takes its place. A name may have * for any text.
    A pure function: jit, grad and vmap it, with respect to params, or to arrays that an edit adds. Attention
    is a plain formula in float32, and nothing is rounded for a cache.
    Raises RequestError for a name that matches nothing, or an edit that gives another shape or type.
    """
    require_observable(model)
    probe = Probe.of(capture, edit)
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise RequestError(f"tokens is {tokens.dtype} {list(tokens.shape)}; give whole numbers, [B, T]")
    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    caches = empty_sequence_caches(model.config)
    hidden, _ = hidden_states(observed(model, probe), params, tokens, positions, caches, None)
    logits = next_token_logits(model, params, hidden)
    probe.check()
    return Forward(tokens, jnp.full(B, T, jnp.int32), logits, probe.seen)


def run(
    llm: LLM,
    prompts: Prompt | Sequence[Prompt],
    *,
    capture: Sequence[str] = (),
    edit: Mapping[str, Any] | None = None,
) -> Forward:
    """As `forward`, compiled, of prompts: text, encoded as for `LLM.generate`, or token ids.

    Shorter prompts are filled up on the right with token 0, which changes nothing before it. The program is
    kept for the next call with the same shape, names and functions; arrays of a `jax.tree_util.Partial` are
    arguments of it, those that a lambda holds are not: a new lambda is a new program.
    """
    names, functions = asked(capture, edit)
    rows = [llm.prompt_ids(prompt) for prompt in as_batch(prompts)]
    _check_rows(llm, rows)
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    edits = {name: as_tree(function) for name, function in functions.items()}
    found = _compiled(llm.transformer, llm.model.params, tokens, names, edits)
    return found.replace(lengths=jnp.asarray(lengths))  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.jit, static_argnums=(0, 3))
def _compiled(
    model: Transformer, params: Params, tokens: Array, capture: Sequence[str], edit: dict[str, Any]
) -> Forward:
    return forward(model, params, tokens, capture=capture, edit=edit)


def names(model: Transformer, params: Params, tokens: int = 1) -> dict[str, tuple[int, ...]]:
    """Every activation of the model and its shape for one sequence of so many tokens. Nothing is computed."""
    if tokens < 1:
        raise RequestError(f"tokens is {tokens}; give 1 or more")
    ids = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    order: list[str] = []

    def all_of(params: Params, tokens: Array) -> dict[str, Array]:
        found = forward(model, params, tokens, capture=["*"]).activations
        order.extend(found)
        return found

    found = jax.eval_shape(all_of, params, ids)
    return {name: tuple(found[name].shape) for name in order}


def require_observable(model: Transformer) -> None:
    """Raises UnsupportedError for a model that a mesh divides, or one with recurrent layers."""
    if isinstance(model, ShardedTransformer):
        raise UnsupportedError("activations are seen on one device; load the model without a mesh")
    if model.config.is_recurrent:
        raise UnsupportedError(
            f"activations of {model.config.architecture}, which has recurrent layers, cannot be seen"
        )


def _check_rows(llm: LLM, rows: list[list[int]]) -> None:
    vocab, context = llm.model.config.vocab_size, llm.model.context
    if not rows:
        raise RequestError("prompts is empty; give at least one")
    for row in rows:
        if not 1 <= len(row) <= context:
            raise RequestError(f"a prompt has {len(row):,} tokens; give from 1 to {context:,}")
        if (wrong := next((i for i in row if not 0 <= i < vocab), None)) is not None:
            raise RequestError(f"a prompt has token id {wrong}; the vocabulary has {vocab:,}")
