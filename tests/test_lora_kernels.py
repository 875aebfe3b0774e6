"""What adapters add to a projection: the plain formula against NumPy, and the C++ kernel against it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import instruction_sets, using

from realm_jax.kernels import native
from realm_jax.kernels.low_rank import LowRankForm, low_rank
from realm_jax.kernels.native import calls

FORMS = [
    LowRankForm(64, (64, 16, 16), 16, 0, 0),
    LowRankForm(96, (40,), 32, 6, 1),
    LowRankForm(34, (7, 21), 16, 10, 2),
]

ADD = jax.jit(calls.add_low_rank, static_argnums=6)


def case(form: LowRankForm, tokens: int, seed: int):
    """Rows of three kinds: none, one adapter, several; and a bank in which slot 0 is empty."""
    rng = np.random.default_rng(seed)
    ranks = np.full((4, 3), form.rank, np.int32)
    bank = rng.standard_normal((4, form.stop)).astype(ml_dtypes.bfloat16).astype(np.float32)
    bank[0], ranks[0], ranks[3, form.column] = 0, 0, form.rank - 3
    a, b = factors(bank, form)
    a[3, ..., -3:] = b[3, -3:] = 0  # beyond the rank
    index = np.array([[0, 0], [2, 0], [1, 3], [3, 3], [0, 1]], np.int32)
    scale = rng.standard_normal(index.shape).astype(np.float32)
    x = rng.standard_normal((len(index), tokens, form.inputs)).astype(np.float32)
    return x, bank, ranks, index, scale


def factors(bank: np.ndarray, form: LowRankForm) -> tuple[np.ndarray, np.ndarray]:
    """Views of a [L, I, P, R] and b [L, R, columns]."""
    a = bank[:, form.start : form.start_b].reshape(len(bank), form.inputs, -1, form.rank)
    return a, bank[:, form.start_b : form.stop].reshape(len(bank), form.rank, -1)


def expected(x: np.ndarray, bank: np.ndarray, index: np.ndarray, scale: np.ndarray, form: LowRankForm):
    """By the definition, in float64."""
    a, b = factors(bank.astype(np.float64), form)
    y = np.zeros((*x.shape[:-1], sum(form.outputs)))
    for row in range(len(x)):
        for slot, factor in zip(index[row], scale[row], strict=True):
            column, at = 0, 0
            for part, (count, padded) in enumerate(zip(form.outputs, form.padded, strict=True)):
                hidden = x[row] @ a[slot, :, part]
                y[row, :, at : at + count] += factor * hidden @ b[slot, :, column : column + count]
                column, at = column + padded, at + count
    return y


def in_pairs(bank: np.ndarray, form: LowRankForm) -> np.ndarray:
    kept = bank.copy()
    a, b = (each.reshape(len(bank), each.shape[1], -1) for each in factors(bank, form))
    for factor, where in ((a, slice(form.start, form.start_b)), (b, slice(form.start_b, form.stop))):
        pairs = factor.reshape(len(bank), factor.shape[1] // 2, 2, -1).swapaxes(2, 3)
        kept[:, where] = pairs.reshape(len(bank), -1)
    return kept.astype(ml_dtypes.bfloat16).view(np.uint16)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_the_plain_formula_is_the_definition(form: LowRankForm, tokens: int):
    x, bank, _, index, scale = case(form, tokens, seed=tokens)
    found = low_rank(jnp.asarray(x), jnp.asarray(bank), jnp.asarray(index), jnp.asarray(scale), form)
    wanted = expected(x, bank, index, scale, form)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    assert not np.asarray(found[0]).any()


@pytest.mark.skipif(native.problem() is not None, reason="no C++ kernels")
class TestNative:
    @settings(deadline=None, max_examples=20)
    @given(st.sampled_from(FORMS), st.sampled_from([1, 4, 9]), st.integers(0, 2**32 - 1))
    def test_the_kernel_is_the_formula(self, form: LowRankForm, tokens: int, seed: int):
        x, bank, ranks, index, scale = case(form, tokens, seed)
        base = np.random.default_rng(seed).standard_normal((*x.shape[:2], sum(form.outputs)), np.float32)
        wanted = expected(x, bank, index, scale, form)
        for name in instruction_sets():
            with using(name):
                found = self.added(base, x, in_pairs(bank, form), ranks, index, scale, form) - base
            # x and x @ a are rounded to bf16
            np.testing.assert_allclose(found, wanted, atol=2.0**-7 * np.abs(wanted).max() + 1e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_a_row_is_the_same_beside_any_others(self, form: LowRankForm):
        x, bank, ranks, index, scale = case(form, 9, seed=3)
        pairs, base = in_pairs(bank, form), np.ones((5, 9, sum(form.outputs)), np.float32)
        together = self.added(base, x, pairs, ranks, index, scale, form)
        assert (together[0] == 1).all()  # no adapter: untouched
        for row in range(5):
            mine = slice(row, row + 1)
            alone = self.added(base[mine], x[mine], pairs, ranks, index[mine], scale[mine], form)
            assert (alone == together[mine]).all()
            for t in (0, 4, 8):
                one = (base[mine, t : t + 1], x[mine, t : t + 1])
                single = self.added(*one, pairs, ranks, index[mine], scale[mine], form)
                assert (single[:, 0] == together[mine, t]).all()

    def added(
        self,
        y: np.ndarray,
        x: np.ndarray,
        bank: np.ndarray,
        ranks: np.ndarray,
        index: np.ndarray,
        scale: np.ndarray,
        form: LowRankForm,
    ) -> np.ndarray:
        return np.asarray(ADD(*map(jnp.asarray, (y, x, bank, ranks, index, scale)), form))
