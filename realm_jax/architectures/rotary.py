"""Which layers turn positions into angles, and how; which see a window."""

import math
from collections.abc import Iterator

from realm_jax.architectures.facts import Architecture
from realm_jax.architectures.hybrid import hybrid_kinds
from realm_jax.config import LayerKind, RopeConfig
from realm_jax.errors import ModelFileError
from realm_jax.metadata import Metadata


def layer_kinds(arch: Architecture, meta: Metadata, layers: int, dense: int) -> tuple[LayerKind, ...]:
    """What distinguishes each layer; `dense`: so many of the first have a plain feed-forward layer."""
    if arch.value_heads is not None:
        return hybrid_kinds(meta, layers, is_grouped=arch.value_heads == "grouped")
    windows = _windows(arch, meta, layers)
    return tuple(
        LayerKind(window, _rope(arch, i, window), dense=i < dense) for i, window in enumerate(windows)
    )


def _windows(arch: Architecture, meta: Metadata, layers: int) -> list[int | None]:
    if arch.window_pattern is None:
        return [None] * layers
    window = meta.count("attention.sliding_window", 1 << 28, default=arch.window)
    if not window:
        return [None] * layers
    return [window if windowed else None for windowed in meta.window_layers(layers, arch.window_pattern)]


def _rope(arch: Architecture, layer: int, window: int | None) -> str:
    is_turned = {
        "all": True,
        "none": True,  # the one rope turns nothing
        "windows": window is not None,
        "three of four": layer % 4 < 3,
    }[arch.rope_on]
    if not is_turned:
        return "none"
    return "local" if window is not None and arch.local_rope else "global"


def read_ropes(
    arch: Architecture, meta: Metadata, rope_dim: int, kinds: tuple[LayerKind, ...]
) -> Iterator[tuple[str, RopeConfig]]:
    """The ropes by name; rope_dim: dimensions turned where no key says."""
    if arch.rope_on == "none":
        yield "global", RopeConfig(0, 1.0, arch.interleaved_rope)
        return
    dims = _even(meta, "rope.dimension_count", rope_dim, default=rope_dim)
    base = meta.real("rope.freq_base", default=10000.0, above=1.0)
    scaling, factor = meta.rope_scaling()
    original = meta.count(
        "rope.scaling.original_context_length", 1 << 28, default=meta.count("context_length", 1 << 28)
    )
    yield (
        "global",
        RopeConfig(
            dims,
            base,
            arch.interleaved_rope,
            scaling,
            factor,
            original,
            magnitude=_magnitude(arch, meta),
            betas=_betas(meta) if arch.yarn_betas else RopeConfig.betas,
        ),
    )
    named = {kind.rope for kind in kinds}
    if "local" in named:
        local_base = meta.real(
            "rope.freq_base_swa", default=base if arch.local_rope is True else arch.local_rope, above=1.0
        )
        of_local = (kind.sizes.head_dim for kind in kinds if kind.rope == "local" and kind.sizes is not None)
        most = min(of_local, default=rope_dim)
        local_dims = _even(meta, "rope.dimension_count_swa", most, default=min(dims, most))
        yield "local", RopeConfig(local_dims, local_base, arch.interleaved_rope)
    if "none" in named:
        yield "none", RopeConfig(0, 1.0, arch.interleaved_rope)


def _even(meta: Metadata, key: str, most: int, *, default: int) -> int:
    dims = meta.count(key, most, default=default)
    if dims % 2:
        raise ModelFileError(f"{meta.source}: {meta.architecture}.{key} is {dims}; it must be even")
    return dims


def yarn_score_factor(arch: Architecture, meta: Metadata) -> float:
    """What the attention scale of latent attention is multiplied by under YaRN: cos and sin reach only a
    part of queries and keys there."""
    if not arch.latent:
        return 1.0
    multiplier, log_factor = _yarn(arch, meta)
    return (_magnitude(arch, meta) * (1.0 + 0.1 * (multiplier or 0.0) * log_factor)) ** 2


def _magnitude(arch: Architecture, meta: Metadata) -> float:
    """What multiplies cos and sin: YaRN's own, over what the model's multiplier says."""
    magnitude = meta.real("rope.scaling.attn_factor", default=1.0, above=0.0)
    multiplier, log_factor = _yarn(arch, meta)
    if multiplier is None:
        return magnitude * (1.0 + 0.1 * log_factor)
    own = multiplier if arch.latent else 1.0
    return magnitude * (1.0 + 0.1 * own * log_factor) / (1.0 + 0.1 * multiplier * log_factor)


def _yarn(arch: Architecture, meta: Metadata) -> tuple[float | None, float]:
    """The multiplier of the logarithm, None where none is given, and the logarithm of YaRN's factor."""
    scaling, factor = meta.rope_scaling()
    log_factor = math.log(factor) if scaling == "yarn" else 0.0
    key = "rope.scaling.yarn_log_multiplier"
    if arch.yarn_multiplier is None or not meta.scalar(key, 0):
        return None, log_factor
    return arch.yarn_multiplier * meta.real(key, above=0.0), log_factor


def _betas(meta: Metadata) -> tuple[float, float]:
    fast, slow = RopeConfig.betas
    return (
        meta.real("rope.scaling.yarn_beta_fast", default=fast, above=0.0),
        meta.real("rope.scaling.yarn_beta_slow", default=slow, above=0.0),
    )
