"""A Transformer of which each device computes its share."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from realm_jax.architectures import parameters
from realm_jax.cache import Cache
from realm_jax.config import ModelConfig, Numerics
from realm_jax.model import Caches, Transformer
from realm_jax.parallel.nodes import AXIS, Split, Summed, Vocabulary
from realm_jax.parallel.shares import Division

OF_CACHES = P(None, AXIS)  # [S, K, ...]: each device has the kv heads that it attends to


class ShardedTransformer(Transformer):
    """As `Transformer`; its params have each device's own, its caches each device's heads.

    devices: their ids.
    """

    devices: tuple[int, ...] = ()

    @nn.nowrap
    def apply(self, variables: Any, *arguments: Any, method: Any = None, **_: Any) -> Any:
        """As `nn.Module.apply`, on all devices."""
        local = Transformer(Division(self.config, len(self.devices)).local, self.block)

        def run(params: Any, *arguments: Any) -> Any:
            joined = _joined(own(params), self.config)
            return local.apply({"params": joined}, *arguments, method=method)

        return jax.shard_map(
            run,
            mesh=mesh_of(self.devices),
            in_specs=specs((variables["params"], *arguments)),
            out_specs=P() if method == "logits" else (P(), OF_CACHES),
            check_vma=False,  # that the sums are the same everywhere is the nodes' word
        )(variables["params"], *arguments)

    @nn.nowrap
    def empty_caches(self, slots: int, capacity: int, numerics: Numerics) -> Caches:
        """As `Transformer.empty_caches`, a device's heads on each."""
        return _empty_caches(self, slots, capacity, numerics)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_caches(model: ShardedTransformer, slots: int, capacity: int, numerics: Numerics) -> Caches:
    local = Transformer(Division(model.config, len(model.devices)).local, model.block)
    return jax.shard_map(
        lambda: local.empty_caches(slots, capacity, numerics),
        mesh=mesh_of(model.devices),
        in_specs=(),
        out_specs=OF_CACHES,
        check_vma=False,
    )()


def on_each(devices: tuple[int, ...], function: Callable[..., Any], state: Any, *arguments: Any) -> Any:
    """`function(state, *arguments)` of each device's own arrays, which is a state like the old one."""
    found = jax.shard_map(
        lambda *given: jax.tree.leaves(function(*own(given))),
        mesh=mesh_of(devices),
        in_specs=specs((state, *arguments)),
        out_specs=jax.tree.leaves(_each_spec(state)),
        check_vma=False,
    )(state, *arguments)
    return jax.tree.unflatten(jax.tree.structure(state), found)


@functools.cache
def mesh_of(devices: tuple[int, ...]) -> Mesh:
    """The mesh of these devices, in this order."""
    by_id = {device.id: device for device in jax.devices()}
    return Mesh(np.array([by_id[each] for each in devices]), (AXIS,))


def own(tree: Any) -> Any:
    """The tree with each device's own nodes, inside `shard_map`."""
    return jax.tree.map(lambda x: x.node if isinstance(x, Split) else x, tree, is_leaf=_is_split)


def specs(tree: Any) -> Any:
    """How a tree stands on the devices: a prefix of it, for `shard_map`."""

    def spec(x: Any) -> P:
        return P(AXIS) if isinstance(x, Split) else OF_CACHES if isinstance(x, Cache) else P()

    return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, Split | Cache))


def _each_spec(tree: Any) -> Any:
    """As `specs`, one for each array."""
    return jax.tree.map(
        lambda spec, part: jax.tree.map(lambda _: spec, part),
        specs(tree),
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )


def _is_split(x: Any) -> bool:
    return isinstance(x, Split)


def _joined(params: Any, config: ModelConfig) -> Any:
    """The params of a device with what joins its part to the others'."""
    for p in parameters(config):
        match p.path:
            case (*_, "out" | "down", "kernel"):
                params = _wrapped(params, p.path, Summed)
    both = {name: Vocabulary(params[name], config.vocab_size) for name in ("embedding", "head")}
    return params | both


def _wrapped(tree: Any, path: tuple[str, ...], wrap: Any) -> Any:
    """The tree with the node at the path wrapped; the given one is left alone."""
    name, *rest = path
    return tree | {name: _wrapped(tree[name], tuple(rest), wrap) if rest else wrap(tree[name])}
