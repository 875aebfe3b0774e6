"""Float32 rows to the types that `realm quantize` writes: the other way of `quant.dequantize`.

The bytes are those of ggml's quantizer, with and without an importance matrix: its searches are arithmetic in
float32 whose order is known. They are Iwan Kawrakow's (K-quants, llama.cpp pull request 1684; importance
matrices, 4861; IQ4_NL, 5590), here as arithmetic on all groups at once.
"""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
from jaxtyping import Float32, UInt8

from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quant import FORMATS
from realm_jax.quant.chunks import for_each_chunk
from realm_jax.quant.encoding import kquants, legacy, small_tables
from realm_jax.quant.formats import BlockFormat, CastFormat

CHUNK = 2**16
"""Values that are best encoded at a time: few enough that a search's arrays stay in the cache."""

LARGEST, LARGEST_ERROR = 1e12, 1e30
"""Beyond what scales of float16 can hold; and what sums of squares in float32 can."""

Encoder = Callable[[np.ndarray, np.ndarray | None], np.ndarray]

ENCODERS: dict[GGMLType, Encoder] = {
    GGMLType.F32: lambda rows, _: rows.astype("<f4").view(np.uint8),
    GGMLType.F16: lambda rows, _: rows.astype("<f2").view(np.uint8),
    GGMLType.BF16: lambda rows, _: rows.astype(ml_dtypes.bfloat16).view(np.uint8),
    **legacy.ENCODERS,
    **kquants.ENCODERS,
    **small_tables.ENCODERS,
}
SEARCHED = {kind for kind in ENCODERS if isinstance(FORMATS[kind], BlockFormat)} - {GGMLType.MXFP4}


def encode(
    rows: Float32[np.ndarray, "R I"],
    ggml_type: GGMLType,
    importance: Float32[np.ndarray, " I"] | None = None,
) -> UInt8[np.ndarray, "R bytes"]:
    """The rows in this type.

    importance: how much the square of an error counts in each column; types that search nothing ignore it.
    Raises ModelFileError for values that are not finite or that the type cannot hold, and for importance
    that float32 cannot multiply by their squares.
    """
    largest = float(np.abs(rows).max(initial=0))  # NaN if any value is
    if not math.isfinite(largest):
        count = int((~np.isfinite(rows)).sum())
        raise ModelFileError(f"{count:,} values are infinite or not a number; only numbers can be quantized")
    too_large = f"values up to {largest:g} are too large for {ggml_type.name} (take BF16 or F32)"
    if ggml_type in SEARCHED:
        weight = 0.0 if importance is None else float(importance.max(initial=0))
        if largest > LARGEST:
            raise ModelFileError(too_large)
        if not weight * max(1, largest) ** 2 < LARGEST_ERROR:
            raise ModelFileError(f"importance up to {weight:g} is too large for values up to {largest:g}")
    with np.errstate(all="ignore"):  # searches divide by zero where no result is used
        encoded = ENCODERS[ggml_type](np.ascontiguousarray(rows), importance)
        stored = _factors(encoded, ggml_type)
    if not np.isfinite(stored).all():
        raise ModelFileError(too_large)
    return encoded


def tensor_bytes(name: str, values: Float32[np.ndarray, "*shape"], ggml_type: GGMLType) -> bytes:
    """The tensor's bytes in this type, of which its rows are whole blocks; all processors compute.

    Raises ModelFileError as `encode`, with the name before what is wrong.
    """
    block = BLOCK_SIZES[ggml_type]
    blocks = values.reshape(-1, block.elements)
    out = np.empty((len(blocks), block.nbytes), np.uint8)

    def encode_chunk(chunk: slice) -> None:
        out[chunk] = encode(blocks[chunk], ggml_type)

    try:
        for_each_chunk(encode_chunk, len(blocks), block.elements, CHUNK)
    except ModelFileError as error:
        raise ModelFileError(f"{name}: {error}") from None
    return out.tobytes()


def _factors(encoded: np.ndarray, ggml_type: GGMLType) -> np.ndarray:
    """All scales and minima, or the values themselves where there are none."""
    form, data = FORMATS[ggml_type], encoded.reshape(-1)
    if isinstance(form, CastFormat):
        return data.view(form.dtype).astype(np.float32)
    parts = form.parts(data)
    return parts.scale if parts.minimum is None else np.hstack([parts.scale, parts.minimum])
