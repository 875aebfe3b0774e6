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
from realm_jax.parallel.nodes import AXIS, Split, Summed, SummedExperts, Vocabulary
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
            joined = _joined(params, self.config)
            return local.apply({"params": joined}, *arguments, method=method)

        out = P() if method == "logits" else (P(), OF_CACHES)
        return on_each(self.devices, run, (variables["params"], *arguments), out)

    @nn.nowrap
    def empty_caches(self, slots: int, capacity: int, numerics: Numerics) -> Caches:
        """As `Transformer.empty_caches`, a device's heads on each."""
        return _empty_caches(self, slots, capacity, numerics)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty_caches(model: ShardedTransformer, slots: int, capacity: int, numerics: Numerics) -> Caches:
    local = Transformer(Division(model.config, len(model.devices)).local, model.block)
    return on_each(model.devices, lambda: local.empty_caches(slots, capacity, numerics), (), OF_CACHES)


def on_each(
    devices: tuple[int, ...], function: Callable[..., Any], arguments: tuple[Any, ...], out: Any
) -> Any:
    """What the function makes of each device's own arrays. out: how that stands on the devices."""
    leaves, structure = jax.tree.flatten(arguments)

    def run(*leaves: jax.Array) -> Any:
        mine = jax.tree.unflatten(structure, leaves)
        return function(*jax.tree.map(lambda x: x.node if _is_split(x) else x, mine, is_leaf=_is_split))

    return jax.shard_map(
        run,
        mesh=mesh_of(devices),
        in_specs=tuple(specs(arguments)),
        out_specs=out,
        check_vma=False,  # that what is the same everywhere is so is the nodes' word
    )(*leaves)


def updated(devices: tuple[int, ...], function: Callable[..., Any], state: Any, *arguments: Any) -> Any:
    """`function(state, *arguments)` of each device's own arrays, which is a state like the old one."""

    def run(*given: Any) -> list[jax.Array]:
        return jax.tree.leaves(function(*given))

    return jax.tree.unflatten(
        jax.tree.structure(state), on_each(devices, run, (state, *arguments), specs(state))
    )


@functools.cache
def mesh_of(devices: tuple[int, ...]) -> Mesh:
    """The mesh of these devices, in this order."""
    by_id = {device.id: device for device in jax.devices()}
    return Mesh(np.array([by_id[each] for each in devices]), (AXIS,))


def specs(tree: Any) -> list[P]:
    """How each array of a tree stands on the devices."""

    def spec(x: Any) -> P:
        return P(AXIS) if _is_split(x) else OF_CACHES if isinstance(x, Cache) else P()

    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Split | Cache))
    return [spec(node) for node in nodes for _ in jax.tree.leaves(node)]


def _is_split(x: Any) -> bool:
    return isinstance(x, Split)


def _joined(params: Any, config: ModelConfig) -> Any:
    """The params of a device with what joins its part to the others'."""
    for p in parameters(config):
        match p.path:
            case (*_, "out" | "down", "kernel"):
                params = _wrapped(params, p.path, Summed)
            case (*mlp, "experts", "down", "0"):
                params = _wrapped(params, (*mlp, "experts"), SummedExperts)
    both = {name: Vocabulary(params[name], config.vocab_size) for name in ("embedding", "head")}
    return params | both


def _wrapped(tree: Any, path: tuple[str, ...], wrap: Any) -> Any:
    """The tree with the node at the path wrapped; the given one is left alone."""
    name, *rest = path
    return tree | {name: _wrapped(tree[name], tuple(rest), wrap) if rest else wrap(tree[name])}
