"""Facts of a model (`ModelConfig`) and of a run (`EngineConfig`)."""

from realm_jax.config.model import (
    Activation,
    DeltaNetConfig,
    LatentConfig,
    LayerKind,
    LayerSizes,
    ModelConfig,
    MoEConfig,
    QKNorm,
    RopeConfig,
    Temperature,
)
from realm_jax.config.run import (
    BLOCK,
    MAX_LORA_RANK,
    MAX_LORAS_PER_REQUEST,
    MIN_ROWS,
    TILE,
    EngineConfig,
    Kernels,
    Numerics,
    size_in_bytes,
)

__all__ = [
    "BLOCK",
    "MAX_LORAS_PER_REQUEST",
    "MAX_LORA_RANK",
    "MIN_ROWS",
    "TILE",
    "Activation",
    "DeltaNetConfig",
    "EngineConfig",
    "Kernels",
    "LatentConfig",
    "LayerKind",
    "LayerSizes",
    "MoEConfig",
    "ModelConfig",
    "Numerics",
    "QKNorm",
    "RopeConfig",
    "Temperature",
    "size_in_bytes",
]
