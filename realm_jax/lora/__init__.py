"""LoRA adapters: read from GGUF and PEFT files, applied to weight nodes."""

from realm_jax.lora.adapter import Adapter, Base, LowRank

__all__ = ["Adapter", "Base", "LowRank"]
