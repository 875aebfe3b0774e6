"""An LLM that serves as another does, with edits in its layers or a logits processor of one's own."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.llm import LLM
from realm_jax.processors import EachRow, LogitsProcessor, Own, Written
from realm_jax.research.activations import forward, names, require_observable
from realm_jax.research.observed import observed
from realm_jax.research.probe import Probe, asked

ONLY_WHOLE = "attention.weights"
"""What exists of whole sequences alone: serving's attention reads its cache in parts."""


class Editor(Own):
    """Edits as a static argument of serving's programs."""

    def see(self, name: str, x: Array, positions: Array) -> Array:
        """The activation, as the edits that name it make it."""
        return Probe((), self.value).see(name, x, positions)


def variant(
    llm: LLM, *, edit: Mapping[str, Any] | None = None, logits_processor: LogitsProcessor | None = None
) -> LLM:
    """An LLM of the same weights that generates with these edits and this processor, many at once.

        calm = variant(llm, edit={"layers.14.resid_post": lambda x: x + 8 * vector})
        calm.generate(prompts)

    edit: as in `forward`; a call computes [rows, T, ...], tokens of any sequences, at positions that
    `AtPositions` says. They add to those that llm has. logits_processor: from the logits [V] of one
    sequence's next token, and what is `Written`, to those that are sampled from, before grammars, bias,
    penalties, temperature and truncation; None = the one that llm has. Log-probabilities stay the model's.
    With a temperature of 1 and no truncation a token is drawn from softmax(logits): so any sampler that is
    a distribution is a processor. Both are part of the compiled programs, of which there are as many as
    without; arrays that they hold are constants there. llm stays as it is; each has slots of its own.
    Raises RequestError for a name that matches nothing or another shape or type, UnsupportedError for
    the weights of attention and on a mesh.
    """
    require_observable(llm.transformer)
    model, (_, edits) = llm.transformer, asked((), edit)
    if edits:
        _check_edits(llm, edits)
        model = observed(model, Editor(edits))
    processor = llm.processor
    if logits_processor is not None:
        if not callable(logits_processor):
            raise RequestError(f"logits_processor is a {type(logits_processor).__name__}; give a function")
        processor = EachRow(logits_processor)
        _check_processor(llm, processor)
    return llm.variant(model, processor)


def _check_edits(llm: LLM, edits: dict[str, Any]) -> None:
    for name in names(llm.transformer, llm.model.params):
        wrong = next((p for p in edits if fnmatchcase(name, p) and name.endswith(ONLY_WHOLE)), None)
        if wrong is not None:
            raise UnsupportedError(
                f"edit of {wrong!r} changes {name}, which serving has only in parts; use "
                "research.forward, or edit attention.q, attention.k, attention.v or attention.heads"
            )
    tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)  # more rows than one, as in serving
    jax.eval_shape(lambda p, t: forward(llm.transformer, p, t, edit=edits).logits, llm.model.params, tokens)


def _check_processor(llm: LLM, processor: EachRow) -> None:
    logits = jax.ShapeDtypeStruct((1, llm.model.config.vocab_size), jnp.float32)
    number = jax.ShapeDtypeStruct((1,), jnp.int32)
    written = Written(jax.ShapeDtypeStruct((1, llm.model.context), jnp.int32), number, number)  # pyright: ignore[reportArgumentType]
    jax.eval_shape(lambda x, w: processor(x, lambda: w), logits, written)
