"""Chat templates: messages to the text that a model was trained on."""

from realm_jax.chat.template import KEY as TEMPLATE_KEY
from realm_jax.chat.template import ChatTemplate

__all__ = ["TEMPLATE_KEY", "ChatTemplate"]
