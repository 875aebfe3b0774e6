"""A Transformer whose layers show a probe what goes through them.

There is one definition of the model: names are those of its modules, and a layer's arithmetic is its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
from jaxtyping import Array, Float, Int

from realm_jax.cache import LayerCache, Slots, Stepwise
from realm_jax.layers import Block, Where
from realm_jax.model import Caches, Transformer
from realm_jax.sequence_cache import SequenceCache

See = Callable[[str, Array], Array]


@runtime_checkable
class Observer(Protocol):
    """Who sees activations by name, and may change them; see `Probe`."""

    def see(self, name: str, x: Array, positions: Array) -> Array: ...


class Observed(Transformer):
    """As `Transformer`, with an observer.

    Not for a program's static argument unless the observer can be one.
    """

    observer: Any = None

    @nn.nowrap
    def layer(
        self, index: int, block: Block, params: Any, x: Array, cache: LayerCache, where: Where
    ) -> tuple[Array, LayerCache]:
        """As `Transformer.layer`, traced for this layer alone: the observer is in no cache of programs."""

        def see(name: str, value: Array) -> Array:
            return self.observer.see(f"layers.{index}.{name}", value, where.positions)

        if index == 0:
            x = self.observer.see("embedding", x, where.positions)
        x = see("resid_pre", x)
        with nn.intercept_methods(functools.partial(_intercept, see)):
            out: Any = block.apply({"params": params}, x, watch(cache, see), where)
        return see("resid_post", out[0]), out[1].inner

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        caches: Caches,
        slots: Int[Array, "B"] | None,
        lengths: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Caches]:
        """As `Transformer.__call__`."""
        hidden, caches = super().__call__(tokens, positions, caches, slots, lengths)
        return self.observer.see("norm", hidden, positions), caches


def observed(model: Transformer, observer: Observer) -> Observed:
    """The model with this observer, after the one that it has, if it has one."""
    if isinstance(model, Observed):
        observer = InTurn(model.observer, observer)
    return Observed(model.config, model.block, observer=observer)


@dataclass(frozen=True)
class InTurn:
    """Two observers: the second sees what the first made."""

    first: Any
    second: Any

    def see(self, name: str, x: Array, positions: Array) -> Array:
        """As `Observer.see`."""
        return self.second.see(name, self.first.see(name, x, positions), positions)


def _intercept(
    see: See, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
) -> Any:
    """The result of a layer's module, what goes in and out of it seen."""
    name = ".".join(context.module.path)
    if not name or context.method_name != "__call__":
        return call(*args, **kwargs)
    first, *rest = args
    if name.startswith("mlp") and name.endswith(".down"):
        first = see(name.removesuffix("down") + "hidden", first)
    out = call(first, *rest, **kwargs)
    return (see(name, out[0]), *out[1:]) if isinstance(out, tuple) else see(name, out)


@dataclass(frozen=True)
class ObservedCache(Stepwise):
    """A cache of serving whose queries, keys, values and results are seen."""

    inner: Any
    see: See

    @property
    def k(self) -> Array:
        """The keys that stand in the cache."""
        return self.inner.k

    def write(self, k: Array, v: Array, slots: Slots, positions: Array) -> "ObservedCache":
        """As `Cache.write`."""
        k, v = self.see("attention.k", k), self.see("attention.v", v)
        return replace(self, inner=self.inner.write(k, v, slots, positions))

    def attend(self, q: Array, slots: Slots, positions: Array, **how: Any) -> Array:
        """As `Cache.attend`."""
        q = self.see("attention.q", q)
        return self.see("attention.heads", self._attend(q, slots, positions, **how))

    def _attend(self, q: Array, slots: Slots, positions: Array, **how: Any) -> Array:
        return self.inner.attend(q, slots, positions, **how)


class ObservedSequence(ObservedCache):
    """A sequence's own keys and values, whose attention is a plain formula: the weights are seen, too."""

    def _attend(self, q: Array, slots: Slots, positions: Array, **how: Any) -> Array:
        return self.inner.mix(self.see("attention.weights", self.inner.weights(q, **how)))


def watch(cache: Any, see: See) -> ObservedCache:
    """The cache as `see` gets to know it."""
    return (ObservedSequence if isinstance(cache, SequenceCache) else ObservedCache)(cache, see)
