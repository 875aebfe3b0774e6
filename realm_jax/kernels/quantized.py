"""The door to products by quantized weights in words: one meaning, several implementations.

I inputs, O outputs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from realm_jax.config import Kernels
from realm_jax.kernels.words import WordFormat, dequantize_words


def quantized_matmul(
    x: Float[Array, "*lead I"],
    words: Int32[Array, "units height O"],
    form: WordFormat,
    *,
    dtype: str,
    kernels: Kernels,
) -> Float32[Array, "*lead O"]:
    """`x @ weight` in float32, of inputs and weights rounded to `dtype`.

    kernels: "pallas"; "xla", the same products left to the compiler; "reference", plain float32 throughout.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return _matmul(rows, words, form, dtype, kernels).reshape(*x.shape[:-1], words.shape[-1])  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x: Array, words: Array, form: WordFormat, dtype: str, kernels: Kernels) -> Array:
    return _IMPLEMENTATIONS[kernels](x, words, form, dtype)


def _reference(x: Array, words: Array, form: WordFormat, dtype: str) -> Array:
    return _dot(x, dequantize_words(words, form), 0)


def _xla(x: Array, words: Array, form: WordFormat, dtype: str) -> Array:
    return _dot(x.astype(dtype), dequantize_words(words, form).astype(dtype), 0)


def _pallas(x: Array, words: Array, form: WordFormat, dtype: str) -> Array:
    from realm_jax.kernels.pallas.matmul import matmul  # half a second that others need not wait

    return matmul(x.astype(dtype), words, form)


_IMPLEMENTATIONS = {"reference": _reference, "xla": _xla, "pallas": _pallas, "native": _xla}


def _forward(x: Array, words: Array, form: WordFormat, dtype: str, kernels: Kernels) -> tuple[Array, Array]:
    return _matmul(x, words, form, dtype, kernels), words  # pyright: ignore[reportReturnType]


def _backward(
    form: WordFormat, dtype: str, kernels: Kernels, words: Array, cotangent: Array
) -> tuple[Array, None]:
    """The transposed product.

    The words are expanded when they are needed and not before: the weights of all layers, kept from the
    forward pass on, would be the whole model.
    """
    words, cotangent = jax.lax.optimization_barrier((words, cotangent))
    kind = "float32" if kernels == "reference" else dtype
    return _dot(cotangent.astype(kind), dequantize_words(words, form).astype(kind), 1), None


_matmul.defvjp(_forward, _backward)


def _dot(x: Array, weight: Array, axis: int) -> Array:
    """The product over this axis of the weight [I, O], in float32."""
    return jax.lax.dot_general(
        x,
        weight,
        (((1,), (axis,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
