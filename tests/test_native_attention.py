"""The C++ attention against NumPy in float64, and bits that depend on the query and what it sees."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import instruction_sets, normal, paired_keys, paired_values, require_native, using

from realm_jax.kernels import reference
from realm_jax.kernels.native import calls

require_native()

BF16 = np.dtype(ml_dtypes.bfloat16)
WEIGHT_ROUNDING = 2.0**-8  # weights are rounded to bf16 before they meet the values
IDLE = 2**30
SPAN = 64  # positions that the kernel takes at once


@dataclass(frozen=True, eq=False)
class Case:
    """A call's arguments: caches are bf16's bits, or int8 codes where there are scales."""

    q: np.ndarray  # [B, T, N, H]
    k: np.ndarray  # [S, K, C, H]
    v: np.ndarray
    scales: tuple[np.ndarray, np.ndarray] | None  # [S, K, C]
    slots: np.ndarray | None  # [B]
    positions: np.ndarray  # [B, T]
    scale: float
    softcap: float | None = None
    window: int | None = None
    sinks: np.ndarray | None = None  # [N]

    @property
    def numbers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """q, k and v as they are multiplied, each row with its own slot, in float64."""
        rows = np.arange(len(self.q)) if self.slots is None else self.slots
        query = self.q.astype(BF16).astype(np.float64)
        if self.scales is None:
            key, value = (x.view(BF16).astype(np.float64) for x in (self.k, self.v))
        else:
            key, value = (
                x * s[..., None].astype(np.float64)
                for x, s in zip((self.k, self.v), self.scales, strict=True)
            )
        return query, key[rows], value[rows]


def attend(case: Case) -> np.ndarray:
    k_scale, v_scale = case.scales or (None, None)
    k, v = (case.k, case.v) if case.scales else (paired_keys(case.k), paired_values(case.v))
    arrays = (case.q, k, v, k_scale, v_scale, case.slots, case.positions)
    given: list[Any] = [None if x is None else jnp.asarray(x) for x in arrays]
    sinks = None if case.sinks is None else jnp.asarray(case.sinks)
    how: dict[str, Any] = {"scale": case.scale, "softcap": case.softcap, "window": case.window}
    return np.asarray(calls.attention(*given, **how, sinks=sinks))


def exact(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention, and the same of the values' magnitudes; idle queries give 0."""
    q, k, v = case.numbers
    group = q.shape[2] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))  # [B, N, C, H]
    scores = np.einsum("btnh,bnch->bntc", q, k, optimize=True) * case.scale
    if case.softcap is not None:
        scores = case.softcap * np.tanh(scores / case.softcap)
    distance = case.positions[:, None, :, None].astype(np.int64) - np.arange(k.shape[2])
    sees = (
        (distance >= 0) & (distance < (case.window or IDLE)) & (case.positions[:, None, :, None] < k.shape[2])
    )
    scores = np.where(sees, scores, -np.inf)
    sinks = np.full(q.shape[2], -1e9) if case.sinks is None else case.sinks.astype(np.float64)
    sinks = sinks[None, :, None, None]
    best = np.maximum(np.where(sees, scores, -1e9).max(-1, keepdims=True), sinks)
    weights = np.where(sees, np.exp(scores - best), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True) + np.exp(sinks - best) * (sinks > -1e9), 1e-300)
    return tuple(np.einsum("bntc,bnch->btnh", weights, x, optimize=True) for x in (v, np.abs(v)))  # pyright: ignore[reportReturnType]


def bf16_bits(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16).view(np.uint16)


def random_case(
    rng: np.random.Generator, B: int, T: int, group: int, H: int, C: int, *, is_int8: bool, **how: Any
) -> Case:
    """Positions end anywhere; three slots in use or more, gathered in any order. bf16 has whole vectors."""
    H = H if is_int8 else -(-H // 16) * 16
    K, has_slots = int(rng.integers(1, 4)), rng.integers(2) == 1
    S = B + 2 if has_slots else B
    ends = rng.integers(T, C + 1, B)
    shape = (S, K, C, H)
    if is_int8:
        k, v = (rng.integers(-127, 128, shape).astype(np.int8) for _ in range(2))
        scales = tuple(rng.uniform(0.001, 0.02, shape[:3]).astype(np.float32) for _ in range(2))
    else:
        k, v, scales = bf16_bits(normal(rng, *shape)), bf16_bits(normal(rng, *shape)), None
    return Case(
        q=normal(rng, B, T, K * group, H) * 2,
        k=k,
        v=v,
        scales=scales,  # pyright: ignore[reportArgumentType]
        slots=rng.choice(S, B).astype(np.int32) if has_slots else None,
        positions=(ends[:, None] - T + np.arange(T)).astype(np.int32),
        scale=H**-0.5,
        **how,
    )


def assert_right(case: Case) -> None:
    found, (wanted, magnitudes) = attend(case), exact(case)
    assert (np.abs(found - wanted) <= WEIGHT_ROUNDING * magnitudes + 1e-5).all()


WINDOWS = [None, 1, 5, 63, 64, 65, 100]
how = {
    "softcap": st.sampled_from([None, 5.0, 30.0]),
    "window": st.sampled_from(WINDOWS),
    "is_int8": st.booleans(),
}


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 2, 7, 64]),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([8, 16, 24, 64, 80, 96, 128, 256]),
    st.sampled_from([64, 128, 320]),
    st.booleans(),
    st.fixed_dictionaries(how),
    st.sampled_from(instruction_sets()),
    st.integers(0, 2**32 - 1),
)
def test_attention_is_softmax_over_what_is_seen(
    B: int, T: int, group: int, H: int, C: int, has_sinks: bool, how: dict[str, Any], name: str, seed: int
):
    rng = np.random.default_rng(seed)
    case = random_case(rng, B, T, group, H, C, **how)
    if has_sinks:  # some above every score, some far below
        case = replace(case, sinks=5 * normal(rng, case.q.shape[2]))
    with using(name):
        assert_right(case)


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([1, 2, 7, 64]),
    st.sampled_from([1, 5]),
    st.sampled_from(WINDOWS),
    st.integers(0, 2**32 - 1),
)
def test_equal_keys_give_the_mean_of_exactly_the_visible_values(
    T: int, group: int, window: int | None, seed: int
):
    """Weights of 1 are exact: one position more or less shows."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, 2, T, group, 32, 256, is_int8=False, window=window)
    case = replace(case, k=np.zeros_like(case.k))
    wanted, magnitudes = exact(case)
    assert (np.abs(attend(case) - wanted) <= 3e-6 * magnitudes).all()


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65])
def test_blocks_at_the_edge_of_a_window_are_seen(window: int):
    """Windows that begin at the last position of a block, and at those around it."""
    rng = np.random.default_rng(window)
    case = random_case(rng, 6, 1, 1, 32, 256, is_int8=False, window=window)
    starts = np.arange(2 * SPAN - 3, 2 * SPAN + 3, dtype=np.int32)[:, None]
    case = replace(case, k=np.zeros_like(case.k), positions=starts + window - 1)
    wanted, magnitudes = exact(case)
    assert (np.abs(attend(case) - wanted) <= 3e-6 * magnitudes).all()


def test_the_sharpest_and_the_flattest_scores():
    """One position that takes all, wherever it lies, and scores that differ by less than a rounding."""
    rng = np.random.default_rng(0)
    for at in (0, 63, 64, 150, 200):
        case = random_case(rng, 1, 1, 3, 64, 256, is_int8=False)
        case = replace(
            case, q=np.ones_like(case.q), slots=None, positions=np.array([[200]], np.int32), scale=2.0
        )
        k = np.zeros(case.k.shape, np.float32)
        k[:, :, at] = 4  # a score of 512 against 0
        found = attend(replace(case, k=bf16_bits(k)))
        value = case.v.view(BF16)[0, :, at].astype(np.float32)
        np.testing.assert_array_equal(found[0, 0], np.repeat(value, 3, axis=0))
        assert_right(replace(case, k=bf16_bits(normal(rng, *k.shape) * 1e-3)))


OPTIONS = [
    {"is_int8": False, "window": None, "softcap": None},
    {"is_int8": False, "window": 77, "softcap": 20.0},
    {"is_int8": True, "window": None, "softcap": 30.0},
    {"is_int8": True, "window": 64, "softcap": None},
]


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("H", [24, 64])
def test_what_a_query_does_not_see_changes_no_bit(H: int, how: dict[str, Any]):
    """Large numbers past the length, before the window, and in slots that no row has."""
    rng = np.random.default_rng(H)
    case = random_case(rng, 3, 5, 2, H, 256, **how)
    found = attend(case)
    seen = np.zeros(case.k.shape[:3], bool)
    for b in range(3):
        slot = b if case.slots is None else case.slots[b]
        low = 0 if case.window is None else max(0, case.positions[b, 0] - case.window + 1)
        seen[slot, :, low : case.positions[b, -1] + 1] = True
    assert not seen.all()
    largest = -127 if how["is_int8"] else 0x7F7F  # bf16's greatest number
    k, v = (np.where(seen[..., None], x, largest).astype(x.dtype) for x in (case.k, case.v))
    scales = case.scales and tuple(np.where(seen, x, np.float32(3e38)) for x in case.scales)
    again = attend(replace(case, k=k, v=v, scales=scales))
    assert again.tobytes() == found.tobytes()


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize(("group", "H"), [(1, 64), (3, 40), (8, 128)])
def test_bits_depend_on_the_query_and_what_it_sees(group: int, H: int, how: dict[str, Any]):
    """Not on the other queries of the call, the slot, the capacity, nor on how a prompt is cut."""
    rng = np.random.default_rng(group)
    whole = random_case(rng, 1, 64, group, H, 256, **how)
    whole = replace(whole, slots=None, k=whole.k[:1], v=whole.v[:1], scales=_first(whole.scales))
    whole = replace(whole, positions=(np.arange(64, dtype=np.int32) + 150)[None])
    wanted, H = attend(whole)[0], whole.q.shape[-1]
    for B, T, C in [(1, 1, 256), (4, 1, 512), (7, 3, 256), (2, 17, 320)]:
        other = random_case(rng, B, T, group, H, C, **how)
        K, b, first, slot = whole.k.shape[1], int(rng.integers(B)), int(rng.integers(0, 65 - T)), B - 1
        shape = (B, K, C, H)
        q, k, v = (
            normal(rng, B, T, K * group, H),
            np.zeros(shape, whole.k.dtype),
            np.zeros(shape, whole.v.dtype),
        )
        q[b], k[slot, :, :256], v[slot, :, :256] = whole.q[0, first : first + T], whole.k[0], whole.v[0]
        scales = whole.scales and tuple(np.pad(x, ((B - 1, 0), (0, 0), (0, C - 256))) for x in whole.scales)
        slots, positions = rng.permutation(B).astype(np.int32), other.positions
        slots[slots == slot], slots[b] = slots[b], slot
        positions[b] = whole.positions[0, first : first + T]
        found = attend(replace(other, q=q, k=k, v=v, scales=scales, slots=slots, positions=positions))
        assert found[b].tobytes() == wanted[first : first + T].tobytes()


def _first(scales: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray] | None:
    return None if scales is None else (scales[0][:1], scales[1][:1])


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("idle", [256, 257, IDLE])
def test_idle_queries_are_finite_and_touch_nothing(idle: int, how: dict[str, Any]):
    """At or past the capacity: whole rows, the end of a row, and any query between others."""
    rng = np.random.default_rng(idle)
    case = random_case(rng, 3, 7, 3, 32, 256, **how)
    found = attend(case)
    is_idle = np.zeros((3, 7), bool)
    is_idle[0], is_idle[1, 4:], is_idle[2, 2] = True, True, True
    positions = np.where(is_idle, idle, case.positions).astype(np.int32)
    q = np.where(is_idle[..., None, None], np.float32(np.nan), case.q)
    again = attend(replace(case, q=q, positions=positions))
    assert np.isfinite(again).all()
    assert again[~is_idle].tobytes() == found[~is_idle].tobytes()


def test_a_slot_past_the_last_is_finite():
    case = random_case(np.random.default_rng(0), 3, 2, 2, 32, 128, is_int8=False)
    slots = np.array([len(case.k), 0, -1], np.int32)
    found = attend(replace(case, slots=slots))
    assert np.isfinite(found).all()
    assert found[1].tobytes() == attend(replace(case, slots=np.zeros(3, np.int32)))[1].tobytes()


def test_a_query_that_is_not_a_number_is_not_hidden():
    case = random_case(np.random.default_rng(0), 2, 5, 2, 48, 128, is_int8=False)
    found = attend(case)
    for value in (np.nan, -np.nan):
        q = case.q.copy()
        q[1, 3, 0, 47] = value
        again = attend(replace(case, q=q))
        assert np.isnan(again[1, 3, 0]).all()
        assert np.isnan(again).sum() == 48 and (again == found).sum() == again.size - 48


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (50, 20.0)])
def test_attention_is_the_references(window: int | None, softcap: float | None):
    case = random_case(
        np.random.default_rng(3), 2, 5, 3, 64, 128, is_int8=False, window=window, softcap=softcap
    )
    case = replace(case, slots=None, k=case.k[:2], v=case.v[:2])
    k, v = (jax.lax.bitcast_convert_type(jnp.asarray(x), jnp.bfloat16) for x in (case.k, case.v))
    options = {"scale": case.scale, "softcap": softcap, "window": window}
    wanted = jax.jit(lambda *x: reference.attention(*x, **options))(case.q, k, v, case.positions)
    np.testing.assert_allclose(attend(case), wanted, atol=2e-2)
