"""Where a model's arrays stand: on one device, or each device's share on its own."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from realm_jax import runtime
from realm_jax.config import EngineConfig, ModelConfig
from realm_jax.model import Transformer
from realm_jax.parallel.model import ShardedTransformer, mesh_of, on_each, updated
from realm_jax.parallel.nodes import AXIS, Split
from realm_jax.parallel.shares import Division, Whole


@runtime_checkable
class Placement(Protocol):
    """Where the arrays of one model stand, and who computes with them."""

    @property
    def is_shared(self) -> bool:
        """Whether other processes take part: then all must ask for the same, and no clock may decide."""
        ...

    def local(self, config: ModelConfig) -> ModelConfig:
        """The model as each device computes it."""
        ...

    def transformer(self, config: ModelConfig) -> Transformer:
        """The model, computed where its arrays stand."""
        ...

    def same(self, make: Callable[[], Any]) -> Any:
        """The arrays that `make` gives, the same on every device."""
        ...

    def split(self, config: ModelConfig, make: Callable[[Whole], Any]) -> Any:
        """The arrays that `make` gives for each device's share."""
        ...

    def each(self, function: Callable[..., Any], arrays: Any) -> Any:
        """`function(arrays)` of each device's own arrays, which are then its own."""
        ...

    def update(self, function: Callable[..., Any], state: Any, *arguments: Any) -> Any:
        """`function(state, *arguments)` of each device's own arrays, which is a state like the old one."""
        ...


@dataclass(frozen=True)
class OneDevice:
    """All on the default device."""

    @property
    def is_shared(self) -> bool:
        return False

    def local(self, config: ModelConfig) -> ModelConfig:
        return config

    def transformer(self, config: ModelConfig) -> Transformer:
        return Transformer(config)

    def same(self, make: Callable[[], Any]) -> Any:
        return make()

    def split(self, config: ModelConfig, make: Callable[[Whole], Any]) -> Any:
        return make(Whole())

    def each(self, function: Callable[..., Any], arrays: Any) -> Any:
        return function(arrays)

    def update(self, function: Callable[..., Any], state: Any, *arguments: Any) -> Any:
        return function(state, *arguments)


@dataclass(frozen=True)
class MeshPlacement:
    """Shares on the devices of these ids, of all processes; a process makes those of its own devices."""

    devices: tuple[int, ...]

    @property
    def is_shared(self) -> bool:
        return jax.process_count() > 1

    def local(self, config: ModelConfig) -> ModelConfig:
        return Division(config, len(self.devices)).local

    def transformer(self, config: ModelConfig) -> Transformer:
        return ShardedTransformer(config, devices=self.devices)

    def same(self, make: Callable[[], Any]) -> Any:
        return self._joined(lambda _: make(), P())

    def split(self, config: ModelConfig, make: Callable[[Whole], Any]) -> Any:
        division = Division(config, len(self.devices))
        return Split(self._joined(lambda i: make(division.share(i)), P(AXIS)))

    def each(self, function: Callable[..., Any], arrays: Any) -> Any:
        return Split(_each(self.devices, function, arrays))

    def update(self, function: Callable[..., Any], state: Any, *arguments: Any) -> Any:
        return updated(self.devices, function, state, *arguments)

    def _joined(self, make: Callable[[int], Any], spec: P) -> Any:
        """The arrays that `make` gives with each device of this process as the default one, as one each.

        No array is ever whole on one device, and nothing is sent between processes.
        """
        mesh = mesh_of(self.devices)
        made = []
        for index, device in enumerate(mesh.devices.flat):
            if device.process_index == jax.process_index():
                with jax.default_device(device):
                    made.append(jax.tree.map(functools.partial(jax.device_put, device=device), make(index)))
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda *arrays: _array(mesh, sharding, arrays), *made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _each(devices: tuple[int, ...], function: Callable[..., Any], arrays: Any) -> Any:
    return on_each(devices, function, (arrays,), P(AXIS))


def _array(mesh: Mesh, sharding: NamedSharding, arrays: tuple[jax.Array, ...]) -> jax.Array:
    first, *rest = arrays[0].shape
    rows = first if sharding.is_fully_replicated else first * mesh.size
    return jax.make_array_from_single_device_arrays((rows, *rest), sharding, list(arrays))


def place(config: EngineConfig) -> Placement:
    """The placement that `config.mesh` asks for. Raises RequestError where there are too few devices."""
    devices = runtime.mesh_devices(config)
    return OneDevice() if len(devices) == 1 else MeshPlacement(tuple(device.id for device in devices))
