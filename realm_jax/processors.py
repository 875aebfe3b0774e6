"""Functions of a user's own inside the compiled step: a logits processor, and what it is told.

C capacity, V vocabulary.
"""

import itertools
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import struct
from jaxtyping import Array

from realm_jax.errors import RequestError

_IDENTITY = f"{os.getpid()}-{secrets.token_hex(8)}"
_numbers = itertools.count(1)


@struct.dataclass
class Written:
    """One sequence as it stands when its next token is chosen."""

    tokens: jax.Array  # [C] the prompt, then what was generated, then whatever
    length: jax.Array  # [] so many of them count
    prompt_length: jax.Array  # [] so many of these are the prompt's


LogitsProcessor = Callable[[Array, Written], Array]
"""From the logits [V] of one sequence's next token, and the sequence, to the logits that are sampled from."""


class Own:
    """A user's own function or object as a static argument of programs: equal to itself alone.

    Its repr names it in this process and no other, so that no program with it is taken for another's.
    """

    def __init__(self, value: Any) -> None:
        self.value = value
        self._number = next(_numbers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._number} of {_IDENTITY})"


class EachRow(Own):
    """A logits processor applied to every row by itself: a row knows nothing of the others."""

    def __call__(self, logits: Array, written: Callable[[], Written]) -> Array:
        """The logits [R, V] as the processor makes them. Raises RequestError for another shape or type."""
        return jax.vmap(self._one)(logits, written())

    def _one(self, logits: Array, written: Written) -> Array:
        found = self.value(logits, written)
        shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", None)
        if shape != logits.shape or dtype != logits.dtype:
            given = type(found).__name__ if shape is None else f"{dtype} {list(shape)}"
            raise RequestError(
                f"logits_processor gives {given}; give {logits.dtype} {list(logits.shape)}, a row's logits"
            )
        return found


@dataclass(frozen=True)
class Unchanged:
    """No logits processor."""

    def __call__(self, logits: Array, written: Callable[[], Written]) -> Array:
        return logits


UNCHANGED = Unchanged()
