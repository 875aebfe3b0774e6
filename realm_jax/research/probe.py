"""Which activations a run keeps, and which it changes, by name."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import Array

from realm_jax.errors import RequestError

Edit = Callable[[Array], Array]
"""From an activation to another of its shape and type."""

SHOWN = 5
"""So many near names an error lists."""


@jax.tree_util.register_pytree_node_class
class AtPositions:
    """An edit that takes the tokens' positions [B, T], too: `AtPositions(fn)`, of `fn(x, positions)`."""

    def __init__(self, function: Callable[[Array, Array], Array]) -> None:
        self.function = as_tree(function)

    def __call__(self, x: Array, positions: Array) -> Array:
        return self.function(x, positions)

    def tree_flatten(self) -> tuple[tuple[Any], None]:
        return (self.function,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any]) -> "AtPositions":
        made = object.__new__(cls)
        made.function = children[0]
        return made


def as_tree(function: Any) -> Any:
    """The function as a pytree: its arrays, if it has some, are arguments of a program; else it is static."""
    return function if not jax.tree_util.all_leaves([function]) else Partial(function)


@dataclass(frozen=True, eq=False)
class Probe:
    """What a run shows of itself: hands each activation on, kept where a pattern names it, or changed.

    One probe is for one trace: what it has seen are that trace's values. A pattern is a name in which *
    stands for any text. Of several edits of an activation, each takes what the one before gave.
    """

    capture: tuple[str, ...]
    edit: Mapping[str, Any]
    seen: dict[str, Array] = field(default_factory=dict)
    names: dict[str, None] = field(default_factory=dict)  # of all that went by, in order

    @classmethod
    def of(cls, capture: Sequence[str], edit: Mapping[str, Any] | None) -> "Probe":
        """Raises RequestError as `asked`."""
        return cls(*asked(capture, edit))

    def see(self, name: str, x: Array, positions: Array) -> Array:
        """The activation, as the edits that name it make it."""
        self.names[name] = None
        for pattern, function in self.edit.items():
            if fnmatchcase(name, pattern):
                changed = function(x, positions) if isinstance(function, AtPositions) else function(x)
                x = _checked(name, x, changed)
        if any(fnmatchcase(name, pattern) for pattern in self.capture):
            self.seen[name] = x
        return x

    def check(self) -> None:
        """Every pattern named something. Raises RequestError for one that did not."""
        for pattern in (*self.capture, *self.edit):
            if not any(fnmatchcase(name, pattern) for name in self.names):
                raise RequestError(
                    f"{pattern!r} names no activation of this model; {near(pattern, self.names)}"
                )


def asked(capture: Any, edit: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names to capture, and the edits. Raises RequestError for what is no name, or no function."""
    if isinstance(capture, str) or not isinstance(capture, Iterable):
        raise RequestError(f"capture is {capture!r}; give a list of names")
    if not isinstance(edit, Mapping | None):
        raise RequestError(f"edit is a {type(edit).__name__}; give a dict from names to functions")
    names, edits = tuple(capture), dict(edit or {})
    for name in (*names, *edits):
        if not isinstance(name, str):
            raise RequestError(f"{name!r:.60} is no name; give one such as 'layers.3.resid_post'")
    for name, function in edits.items():
        if not callable(function):
            raise RequestError(
                f"edit of {name!r} is a {type(function).__name__}; give a function of the activation"
            )
    return names, edits


def near(pattern: str, names: Mapping[str, Any]) -> str:
    """What may have been meant: the kinds of names that are like it, else all; * stands for a layer."""
    kinds = list(dict.fromkeys(_kind(name) for name in names))
    found = difflib.get_close_matches(_kind(pattern), kinds, SHOWN, cutoff=0.6)
    layers = len({name.split(".")[1] for name in names if name.startswith("layers.")})
    return f"{'near' if found else 'there'} are {', '.join(found or kinds)}; it has {layers} layers"


def _kind(name: str) -> str:
    return re.sub(r"^layers\.\d+\.", "layers.*.", name)


def _checked(name: str, x: Array, changed: Any) -> Array:
    shape, dtype = getattr(changed, "shape", None), getattr(changed, "dtype", None)
    if shape != x.shape or dtype != x.dtype:
        given = type(changed).__name__ if shape is None else f"{dtype} {list(shape)}"
        raise RequestError(f"edit of {name!r} gives {given}; the activation is {x.dtype} {list(x.shape)}")
    return changed
