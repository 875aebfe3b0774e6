"""Quantized weights in tiles: the layout that the CPU kernels multiply by, and the plain formula for it.

A tile is 16 outputs, one record of bytes: codes, then scales, then minima, filled up to 64 bytes.

- codes: for each block of 32 inputs, eight vectors of 64 bytes: 16 outputs of four inputs each, unsigned.
  Where codes have four bits, the last four vectors stand in the upper halves of the first four's bytes.
- scales: [S, 16] super-scales, then, if the format has them, int8 [G, 16] that multiply them.
- minima: the same again, if the format has them.

    weight = scale * (code - offset) + minimum

L tiles, I inputs, O outputs, S super-groups and G groups of inputs.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from realm_jax.kernels.reference import matmul

LANES = 16
"""Outputs of a tile."""
BLOCK_INPUTS = 32
ALIGNMENT = 64


@dataclass(frozen=True)
class TileFormat:
    """What a record is made of."""

    inputs: int
    group: int  # inputs that share a scale, as far as kernels know: 16 or 32
    super_group: int  # inputs that share a super-scale
    bits: int  # of a code: 4 or 8
    table: tuple[int, ...]  # the 16 codes that 4-bit indices stand for; empty: they are the codes
    offset: int  # what a code is more than its value
    factor: str  # dtype of super-scales and -minima: float16 or float32
    has_bytes: bool
    has_minimum: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of the codes, of the super-scales (and -minima), and of what multiplies these."""
        supers = self.inputs // self.super_group * LANES
        group_bytes = self.inputs // self.group * LANES if self.has_bytes else 0
        return self.inputs * LANES * self.bits // 8, supers * jnp.dtype(self.factor).itemsize, group_bytes

    @property
    def record(self) -> int:
        """Bytes of a tile."""
        codes, supers, group_bytes = self.sizes
        used = codes + (supers + group_bytes) * (2 if self.has_minimum else 1)
        return -(-used // ALIGNMENT) * ALIGNMENT


def tiles_matmul(
    x: Float[Array, "*lead I"], tiles: UInt8[Array, "L bytes"], form: TileFormat, outputs: int
) -> Float[Array, "*lead O"]:
    """`x @ weight.T`, all in float32."""
    y = _tiles_matmul(x.reshape(-1, x.shape[-1]).astype(jnp.float32), tiles, form, outputs)
    return y.reshape(*x.shape[:-1], outputs)  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _tiles_matmul(x: Array, tiles: Array, form: TileFormat, outputs: int) -> Array:
    return matmul(x, dequantize_tiles(tiles, form)[:outputs])


def _tiles_forward(x: Array, tiles: Array, form: TileFormat, outputs: int) -> tuple[Array, Array]:
    return _tiles_matmul(x, tiles, form, outputs), tiles  # pyright: ignore[reportReturnType]


def tiles_backward(form: TileFormat, outputs: int, tiles: Array, cotangent: Array) -> tuple[Array, None]:
    """The transposed product.

    The codes are expanded again, and not before they are needed: the weights of all layers, kept from the
    forward pass on, would be the whole model in float32.
    """
    tiles, cotangent = jax.lax.optimization_barrier((tiles, cotangent))
    weight = dequantize_tiles(tiles, form)[:outputs]
    return jnp.matmul(cotangent, weight, precision=jax.lax.Precision.HIGHEST), None


_tiles_matmul.defvjp(_tiles_forward, tiles_backward)


def dequantize_tiles(tiles: UInt8[Array, "L bytes"], form: TileFormat) -> Float[Array, "O I"]:
    """The weights in float32, those that fill the last tile included."""
    stored, factors = _parts(tiles, form)
    weights = _weights(stored.transpose(0, 3, 1, 2, 4), [f.swapaxes(1, 2) for f in factors], form)
    return weights.reshape(-1, form.inputs)


def tile_rows(
    tiles: UInt8[Array, "L bytes"], form: TileFormat, ids: Int[Array, "*lead"]
) -> Float[Array, "*lead I"]:
    """The weights of some outputs in float32: what an embedding looks up."""
    # the tiles first: taken apart before, all of them would be
    stored, factors = _parts(tiles[ids.reshape(-1) // LANES], form)
    each, lane = jnp.arange(ids.size, dtype=ids.dtype), ids.reshape(-1) % LANES
    rows = _weights(stored[each, :, :, lane], [factor[each, :, lane] for factor in factors], form)
    return rows.reshape(*ids.shape, form.inputs)


def _parts(tiles: Array, form: TileFormat) -> tuple[Array, list[Array]]:
    """Codes as bytes [L, I / 32, 4 or 8, 16, 4], and the factors [L, S or G, 16]."""
    codes, supers, group_bytes = form.sizes
    stored = tiles[:, :codes].reshape(len(tiles), form.inputs // BLOCK_INPUTS, form.bits, LANES, 4)
    factors = []
    for start in (codes, codes + supers + group_bytes)[: 1 + form.has_minimum]:
        numbers = tiles[:, start : start + supers].reshape(
            len(tiles), form.inputs // form.super_group, LANES, -1
        )
        factors.append(jax.lax.bitcast_convert_type(numbers, jnp.dtype(form.factor)))
        if form.has_bytes:
            bytes_ = tiles[:, start + supers : start + supers + group_bytes]
            factors.append(jax.lax.bitcast_convert_type(bytes_, jnp.int8).reshape(len(tiles), -1, LANES))
    return stored, factors


def _weights(stored: Array, factors: list[Array], form: TileFormat) -> Float[Array, "*lead I"]:
    """From bytes [..., I / 32, 4 or 8, 4] and factors [..., S or G]."""
    if form.bits == 4:
        stored = jnp.concatenate([stored & 15, stored >> 4], axis=-2)
        stored = jnp.array(form.table, jnp.uint8)[stored] if form.table else stored
    codes = stored.reshape(*stored.shape[:-3], form.inputs).astype(jnp.int32) - form.offset
    columns = [jnp.repeat(f.astype(jnp.float32), form.inputs // f.shape[-1], axis=-1) for f in factors]
    if form.has_bytes:
        columns = [a * b for a, b in zip(columns[::2], columns[1::2], strict=True)]
    weights = columns[0] * codes.astype(jnp.float32)
    return weights + columns[1] if form.has_minimum else weights
