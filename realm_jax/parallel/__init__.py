"""Tensor parallelism: each device of a mesh has its share of the heads, the features and the vocabulary.

As in Megatron (Shoeybi et al. 2019): the projections into heads and features are divided along their
outputs, those that return along their inputs, and what returns is summed over the devices.
"""

from realm_jax.parallel.model import ShardedTransformer
from realm_jax.parallel.placement import MeshPlacement, OneDevice, Placement, place
from realm_jax.parallel.shares import Division

__all__ = ["Division", "MeshPlacement", "OneDevice", "Placement", "ShardedTransformer", "place"]
