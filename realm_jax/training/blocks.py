"""Blocks that trade time for memory."""

from typing import Any

import flax.linen as nn
import jax

from realm_jax.layers import Block


class CheckpointedBlock(Block):
    """A block that keeps its inputs alone and is computed anew in the backward pass (Chen et al. 2016)."""

    @nn.nowrap
    def apply(self, variables: Any, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return jax.checkpoint(super().apply)(variables, *args)
