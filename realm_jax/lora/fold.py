"""Adapters folded into a tensor: what it would be, had it been trained as they say."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from realm_jax.lora.adapter import Adapter


def fold(
    values: Float32[np.ndarray, "rows ..."],
    name: str,
    adapters: Sequence[tuple[Adapter, float]],
    first_row: int,
) -> Float32[np.ndarray, "rows ..."]:
    """Rows `first_row` and on of the tensor, changed by the adapters; `values` themselves where none does.

    values: [rows, I] of a matrix, [rows] of a vector, as the base has them. What one adapter makes of the
    base is its change; changes are multiplied by the adapters' scales and added, so scale 0 is the base.
    """
    changing = [(adapter, scale) for adapter, scale in adapters if scale and adapter.changes(name)]
    match changing:
        case []:
            return values
        case [(adapter, 1.0)]:
            return _changed(values, name, adapter, first_row)
    total = values.copy()
    for adapter, scale in changing:
        total += np.float32(scale) * _change(values, name, adapter, first_row)
    return total


def _changed(values: np.ndarray, name: str, adapter: Adapter, first_row: int) -> np.ndarray:
    """The rows as this adapter alone makes them."""
    last_row = first_row + len(values)
    if name in adapter.replaced:
        return adapter.replaced[name][first_row:last_row]
    moved = values + adapter.deltas[name].rows(first_row, last_row)
    if name not in adapter.magnitudes:
        return moved
    lengths = np.sqrt((moved * moved).sum(axis=1))
    # A row of zeros has no direction to give a length to.
    factors = np.divide(
        adapter.magnitudes[name][first_row:last_row], lengths, out=np.zeros_like(lengths), where=lengths > 0
    )
    return moved * factors[:, None]


def _change(values: np.ndarray, name: str, adapter: Adapter, first_row: int) -> np.ndarray:
    """What this adapter adds to the rows."""
    if name in adapter.replaced or name in adapter.magnitudes:
        return _changed(values, name, adapter, first_row) - values
    return adapter.deltas[name].rows(first_row, first_row + len(values))
