"""What the metadata of a hybrid model says of its layers."""

import numpy as np

from realm_jax.config import DeltaNetConfig, LayerKind
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.metadata import Metadata


def hybrid_kinds(meta: Metadata, layers: int, *, is_grouped: bool) -> tuple[LayerKind, ...]:
    """The kind of each layer: a gated delta net, or gated attention in every fourth or where flags say.

    is_grouped: as in `DeltaNetConfig`.
    """
    net = _delta_net(meta, is_grouped)
    return tuple(
        LayerKind(delta_net=net) if recurs else LayerKind(is_gated=True)
        for recurs in _recurrent_layers(meta, layers)
    )


def _delta_net(meta: Metadata, is_grouped: bool) -> DeltaNetConfig:
    name = f"{meta.source}: {meta.architecture}.ssm"
    keys, values = meta.count("ssm.group_count", 1 << 12), meta.count("ssm.time_step_rank", 1 << 12)
    size, inner = meta.count("ssm.state_size", 1 << 10), meta.count("ssm.inner_size", 1 << 22)
    if values % keys:
        raise ModelFileError(f"{name}.time_step_rank is {values}, no multiple of group_count {keys}")
    if inner != values * size:
        raise UnsupportedError(
            f"{name}.inner_size is {inner:,}; {values} heads (time_step_rank) of state_size {size} fit"
        )
    taps = meta.count("ssm.conv_kernel", 64)
    if taps < 2:
        raise ModelFileError(f"{name}.conv_kernel is {taps}; it must be from 2 to 64")
    return DeltaNetConfig(keys, values, size, taps, is_grouped)


def _recurrent_layers(meta: Metadata, layers: int) -> list[bool]:
    """Whether each layer is recurrent: an array of flags, or all but each n-th."""
    key = "attention.recurrent_layers"
    if not meta.has(key):
        period = meta.count("full_attention_interval", 1 << 12, default=4)
        return [(layer + 1) % period != 0 for layer in range(layers)]
    flags = meta.flags(key)
    if flags is None or len(flags) < layers:
        raise ModelFileError(f"{meta.source}: {meta.architecture}.{key} must be an array of {layers} flags")
    return [bool(flag) for flag in np.asarray(flags)[:layers]]
