"""Chat templates: messages to the text that a model was trained on."""

from realm_jax.chat.template import ChatTemplate

__all__ = ["ChatTemplate"]
