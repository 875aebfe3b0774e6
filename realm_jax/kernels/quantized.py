"""The door to products by quantized weights in words: one meaning, several implementations.

I inputs, O outputs, E experts, T tiles of M rows.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Int32

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


def grouped_quantized_matmul(
    x: Float[Array, "T M I"],
    words: Int32[Array, "E units height O"],
    expert: Int[Array, "T"],
    form: WordFormat,
    *,
    dtype: str,
    kernels: Kernels,
) -> Float32[Array, "T M O"]:
    """Each tile of rows times the weight of its expert, as `quantized_matmul`; zero where that is -1."""
    return _grouped(x.astype(jnp.float32), words, expert, form, dtype, kernels)  # pyright: ignore[reportReturnType]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _grouped(x: Array, words: Array, expert: Array, form: WordFormat, dtype: str, kernels: Kernels) -> Array:
    if kernels == "pallas":
        from realm_jax.kernels.pallas.matmul import grouped_matmul

        return grouped_matmul(x.astype(dtype), words, expert, form)

    def one(tile: tuple[Array, Array]) -> Array:
        rows, e = tile
        product = _IMPLEMENTATIONS[kernels](rows, words[jnp.maximum(e, 0)], form, dtype)
        return jnp.where(e < 0, 0.0, product)

    return jax.lax.map(one, (x, expert))


def _grouped_forward(
    x: Array, words: Array, expert: Array, form: WordFormat, dtype: str, kernels: Kernels
) -> tuple[Array, tuple[Array, Array]]:
    return _grouped(x, words, expert, form, dtype, kernels), (words, expert)  # pyright: ignore[reportReturnType]


def _grouped_backward(
    form: WordFormat, dtype: str, kernels: Kernels, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None, None]:
    words, expert = kept

    def one(tile: tuple[Array, Array]) -> Array:
        rows, e = tile
        product = _backward(form, dtype, kernels, words[jnp.maximum(e, 0)], rows)[0]
        return jnp.where(e < 0, 0.0, product)

    return jax.lax.map(one, (cotangent, expert)), None, None


_grouped.defvjp(_grouped_forward, _grouped_backward)


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
