"""Types of tensors, as flags name them."""

from typing import TYPE_CHECKING

from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.ggml import GGMLType

NAMES = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4"
"""For help texts; the encoder's own are in a module that takes long to import."""


def tensor_type(flag: str, text: str | None) -> "GGMLType | None":
    """The type of that name. Raises RequestError with those that can be written."""
    from realm_jax.quant.encoding import ENCODERS

    if text is None:
        return None
    found = {kind.name: kind for kind in ENCODERS}.get(text.upper())
    if found is None:
        raise RequestError(f"{flag} is {text!r}; it is one of {NAMES}")
    return found
