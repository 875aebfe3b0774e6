"""Text to token ids and back, as the model's file says."""

from realm_jax.tokenizer.stream import TextStream
from realm_jax.tokenizer.tokenizer import Tokenizer

__all__ = ["TextStream", "Tokenizer"]
