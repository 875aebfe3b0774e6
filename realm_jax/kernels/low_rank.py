"""What low-rank adapters add to a projection, each row of a call having adapters of its own.

A bank has L slots, each with the factors of one adapter for every projection of a model; slot 0 adds
nothing. B rows, A adapters of a row, T tokens, I inputs, O outputs, P parts, R rank.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES = 16
"""Outputs of a part, and ranks, are padded to multiples: the vectors of the C++ kernel."""


@dataclass(frozen=True)
class LowRankForm:
    """Where the factors of one projection stand in a slot: a [I, P, R], then b [R, padded outputs].

    A projection is of P parts, the outputs of one after those of another; each part has an `a` and a `b`.
    """

    inputs: int
    outputs: tuple[int, ...]  # of each part
    rank: int
    start: int  # of a in the slot, in numbers
    column: int  # of the bank's ranks

    @property
    def padded(self) -> tuple[int, ...]:
        """The outputs of each part as they are stored."""
        return tuple(-(-count // LANES) * LANES for count in self.outputs)

    @property
    def start_b(self) -> int:
        return self.start + self.inputs * len(self.outputs) * self.rank

    @property
    def stop(self) -> int:
        return self.start_b + self.rank * sum(self.padded)


def low_rank(
    x: Float[Array, "B *lead I"],
    bank: Float[Array, "L N"],
    index: Int[Array, "B A"],
    scale: Float[Array, "B A"],
    form: LowRankForm,
) -> Float[Array, "B *lead O"]:
    """The sum over each row's adapters of `scale * (x @ a) @ b`, in float32."""
    rows = x.reshape(x.shape[0], -1, form.inputs)
    y = jnp.zeros((*rows.shape[:2], sum(form.outputs)), jnp.float32)
    for j in range(index.shape[1]):  # one after another: bits must not depend on how many places there are
        y = y + _one(rows, bank, index[:, j], scale[:, j], form)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _one(rows: Float[Array, "B T I"], bank: Array, index: Array, scale: Array, form: LowRankForm) -> Array:
    """One adapter's part of each row."""
    a = _taken(bank, index, form.start, form.start_b).reshape(len(index), form.inputs, -1)
    b = _taken(bank, index, form.start_b, form.stop).reshape(len(index), form.rank, -1)
    hidden = _product(rows, a) * scale[:, None, None]
    parts, column = [], 0
    for p, (count, padded) in enumerate(zip(form.outputs, form.padded, strict=True)):
        mine = hidden[..., p * form.rank : (p + 1) * form.rank]
        parts.append(_product(mine, b[..., column : column + count]))
        column += padded
    return jnp.concatenate(parts, axis=-1)


def _taken(bank: Array, index: Array, start: int, stop: int) -> Float[Array, "B M"]:
    """These numbers of each row's slot; the rest of the bank is not touched."""
    taken = jax.vmap(lambda slot: jax.lax.dynamic_slice(bank, (slot, start), (1, stop - start))[0])(index)
    return taken.astype(jnp.float32)


def _product(x: Float[Array, "B T I"], w: Float[Array, "B I O"]) -> Float[Array, "B T O"]:
    return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST)
