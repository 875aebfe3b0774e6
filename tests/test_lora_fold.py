"""Folding: the changes of adapters, scaled and added, whatever rows are asked for."""

import numpy as np
import pytest

from realm_jax.lora.adapter import Adapter, LowRank
from realm_jax.lora.fold import fold

NAME = "blk.0.attn_q.weight"
ROWS, INPUTS, RANK = 12, 8, 3
rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def low_rank(scale: float = 0.5) -> LowRank:
    return LowRank(normal(RANK, INPUTS), normal(ROWS, RANK), scale)


W = normal(ROWS, INPUTS)
PLAIN = Adapter("plain", {NAME: low_rank()})
DORA = Adapter("dora", {NAME: low_rank(2.0)}, magnitudes={NAME: np.abs(normal(ROWS))})
WHOLE = Adapter("whole", {}, replaced={NAME: normal(ROWS, INPUTS)})
OTHER = Adapter("other", {"output.weight": low_rank()})


def alone(adapter: Adapter) -> np.ndarray:
    """The tensor with this adapter at scale 1, in float64, from the definitions."""
    if NAME in adapter.replaced:
        return adapter.replaced[NAME].astype(np.float64)
    delta = adapter.deltas[NAME]
    moved = W + delta.scale * delta.b.astype(np.float64) @ delta.a
    if NAME not in adapter.magnitudes:
        return moved
    return adapter.magnitudes[NAME][:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)


@pytest.mark.parametrize("adapter", [PLAIN, DORA, WHOLE], ids=lambda a: a.name)
@pytest.mark.parametrize("scale", [1.0, 0.5, -2.0])
def test_one_adapter(adapter: Adapter, scale: float):
    np.testing.assert_allclose(
        fold(W, NAME, [(adapter, scale)], 0), W + scale * (alone(adapter) - W), atol=1e-5
    )


def test_changes_add():
    adapters = [(PLAIN, 0.5), (DORA, 1.0), (WHOLE, -0.25), (OTHER, 9.0)]
    expected = W + sum(scale * (alone(adapter) - W) for adapter, scale in adapters[:3])
    np.testing.assert_allclose(fold(W, NAME, adapters, 0), expected, atol=1e-5)


@pytest.mark.parametrize("adapters", [[(PLAIN, 1.0)], [(DORA, 1.0), (PLAIN, 2.0)], [(WHOLE, 1.0)]])
def test_some_rows_are_those_of_the_whole(adapters: list[tuple[Adapter, float]]):
    whole = fold(W, NAME, adapters, 0)
    parts = [fold(W[i : i + 5], NAME, adapters, i) for i in range(0, ROWS, 5)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)


def test_nothing_is_changed_by_scale_zero_or_another_tensors_adapter():
    assert fold(W, NAME, [(PLAIN, 0.0), (DORA, 0.0), (OTHER, 1.0)], 0) is W


def test_a_whole_tensor_is_brought_bit_for_bit():
    np.testing.assert_array_equal(fold(W * 1e6, NAME, [(WHOLE, 1.0)], 0), WHOLE.replaced[NAME])


def test_a_row_of_zeros_stays_zero():
    zero = LowRank(np.zeros((1, INPUTS), np.float32), np.zeros((ROWS, 1), np.float32), 1.0)
    adapter = Adapter("zero", {NAME: zero}, magnitudes={NAME: np.ones(ROWS, np.float32)})
    values = W.copy()
    values[3] = 0
    assert np.isfinite(folded := fold(values, NAME, [(adapter, 1.0)], 0)).all()
    assert not folded[3].any()
