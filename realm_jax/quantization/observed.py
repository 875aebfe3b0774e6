"""Weight nodes that see what they multiply: the sums of squares that an importance matrix is made of.

An `Observed` node stands where a projection stood and gives the same product. While a program runs, it hands
the sums over its rows to an `Observer`, which adds them up on the host.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int

from realm_jax.architectures import parameters
from realm_jax.config import TILE, ModelConfig, Numerics
from realm_jax.errors import ModelFileError, RequestError
from realm_jax.experts import Between, EachExpert, Experts, GroupedExperts
from realm_jax.kernels import matmul
from realm_jax.model import Caches, Transformer, hidden_states
from realm_jax.nodes import Kernel
from realm_jax.quantization.importance import Squares
from realm_jax.weights import Params


@dataclass(eq=False)
class Observer:
    """The sums so far. names: the tensors that share the inputs of a place."""

    names: list[tuple[str, ...]] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)  # float64 [experts, inputs]
    counts: list[np.ndarray] = field(default_factory=list)  # [experts]
    lock: threading.Lock = field(default_factory=threading.Lock)

    def place(self, names: Sequence[str], experts: int, inputs: int) -> jax.Array:
        """A new place's number."""
        self.names.append(tuple(names))
        self.sums.append(np.zeros((experts, inputs)))
        self.counts.append(np.zeros(experts, np.int64))
        return jnp.int32(len(self.names) - 1)

    def add(self, place: Any, sums: Any, counts: Any) -> None:
        """Sums [experts, inputs] over counts [experts] rows belong to the place as well."""
        with self.lock:
            self.sums[int(place)] += np.asarray(sums, np.float64)
            self.counts[int(place)] += np.asarray(counts, np.int64)

    def squares(self) -> dict[str, Squares]:
        """By tensor. Raises ModelFileError where a sum is not finite."""
        for names, sums in zip(self.names, self.sums, strict=True):
            if not np.isfinite(sums).all():
                raise ModelFileError(
                    f"inputs of {names[0]} are infinite or not a number (try --dtype float32)"
                )
        entries = zip(self.names, self.sums, self.counts, strict=True)
        return {name: Squares(sums, counts) for names, sums, counts in entries for name in names}


@struct.dataclass
class Observed:
    """A projection whose inputs are seen."""

    __array_ufunc__ = None

    kernel: Kernel
    place: jax.Array  # int32, data: one program serves all layers
    observer: Observer = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.kernel.shape

    def __rmatmul__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        rows = x.reshape(-1, x.shape[-1])
        sums = jnp.sum(jnp.square(rows), axis=0, keepdims=True)
        io_callback(self.observer.add, None, self.place, sums, np.array([len(rows)], np.int32))
        return x @ self.kernel


@struct.dataclass
class ObservedExperts:
    """Experts whose inputs and inner features are seen: by each expert those of rows that chose it."""

    experts: EachExpert | GroupedExperts
    gate_up_place: jax.Array
    down_place: jax.Array
    observer: Observer = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts.shape

    def mix(
        self, x: Float[Array, "*lead D"], chosen: Int[Array, "*lead A"], share: Array, between: Between
    ) -> Float[Array, "*lead D"]:
        """As `Experts.mix`."""
        rows, count = x.reshape(-1, x.shape[-1]), self.shape[0]
        numbers = jnp.arange(count, dtype=chosen.dtype)
        is_mine = (chosen.reshape(len(rows), -1, 1) == numbers[None, None]).any(axis=1).T  # [E, R]
        counts, weight = is_mine.sum(axis=1), is_mine.astype(jnp.float32)
        io_callback(self.observer.add, None, self.gate_up_place, matmul(weight, jnp.square(rows).T), counts)
        inner = [
            jnp.sum(jnp.where(is_mine[e][:, None], jnp.square(between(rows @ self._gate_up(e))), 0.0), axis=0)
            for e in range(count)
        ]
        io_callback(self.observer.add, None, self.down_place, jnp.stack(inner), counts)
        return self.experts.mix(x, chosen, share, between)

    def _gate_up(self, expert: int) -> Any:
        each = self.experts.gate_up
        return each[expert] if isinstance(each, tuple) else jax.tree.map(lambda array: array[expert], each)


def observed(params: Params, config: ModelConfig, observer: Observer) -> Params:
    """The params with every projection of the layers observed, under the names of the file's tensors."""
    found: Params = jax.tree.map(lambda node: node, params, is_leaf=lambda node: not isinstance(node, dict))
    names: dict[tuple[str, ...], list[str]] = {}
    for parameter in parameters(config):
        if not parameter.is_vector and parameter.path[0].startswith("layer_"):
            here = names.setdefault(_without_expert(parameter.path), [])
            here += [f"{part.name}.weight" for part in parameter.parts if not part.expert]
    for path, here in names.items():
        *parents, leaf = path
        inner = _at(found, parents)
        if parents[-1] == "experts" or len(inner[leaf].shape) != 2:  # a matrix a head is not observed
            continue
        inner[leaf] = Observed(inner[leaf], observer.place(here, 1, inner[leaf].shape[0]), observer)
    for path in {path[:-1] for path in names if path[-2] == "experts"}:
        *parents, leaf = path
        inner = _at(found, parents)
        node: Experts = inner[leaf]
        assert isinstance(node, EachExpert | GroupedExperts)
        count, hidden, features = node.shape
        inner[leaf] = ObservedExperts(
            node,
            observer.place(names[*path, "gate_up"], count, hidden),
            observer.place(names[*path, "down"], count, features),
            observer,
        )
    return found


def _at(params: Params, path: Sequence[str]) -> Params:
    """The part of the params in which what the path leads to stands."""
    return functools.reduce(lambda tree, key: tree[key], path, params)


def _without_expert(path: tuple[str, ...]) -> tuple[str, ...]:
    """The path of a parameter of experts without the expert's number."""
    return path[:-1] if len(path) > 2 and path[-3] == "experts" else path


def observe(
    model: Transformer,
    params: Params,
    numerics: Numerics,
    windows: Sequence[Sequence[int]],
    on_window: Callable[[int], None] | None = None,
) -> Mapping[str, Squares]:
    """What the projections of the layers see of the windows' tokens, each window by itself.

    on_window: called with the number of windows that are done.
    Raises RequestError where windows are no multiple of a tile.
    """
    length = len(windows[0])
    if length % TILE:
        raise RequestError(f"a window is {length} tokens; it has to be a multiple of {TILE} (-c 512)")
    observer = Observer()
    watched = observed(params, model.config, observer)
    caches = model.empty_caches(1, length, numerics)
    for done, window in enumerate(windows, 1):
        tiles = np.asarray(window, np.int32).reshape(-1, TILE)
        caches = _run(model, watched, caches, tiles)
        jax.block_until_ready(caches)
        if on_window is not None:
            on_window(done)
    jax.effects_barrier()
    return observer.squares()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _run(model: Transformer, params: Params, caches: Caches, tiles: Int[Array, "B T"]) -> Caches:
    """The caches after tiles that follow one another from position 0 on."""
    positions = jnp.arange(tiles.size, dtype=jnp.int32).reshape(tiles.shape)
    slots = jnp.zeros(tiles.shape[0], jnp.int32)
    return hidden_states(model, params, tiles, positions, caches, slots)[1]
