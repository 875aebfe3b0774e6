"""Encoded rows: ggml's bytes, the nearest values, and an error where a type cannot hold them."""

import gguf as gguf_py
import make_golden_encodings
import numpy as np
import pytest
from make_golden_encodings import GOLDEN, NUMBERS

from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quant import dequantize
from realm_jax.quant.encoding import CHUNK, ENCODERS, encode, search, tensor_bytes
from realm_jax.quant.encoding.layout import packed, six_bit_bytes
from realm_jax.quant.formats import planes
from realm_jax.quant.kquants import six_bit_scales

BLOCKS = [kind for kind in ENCODERS if kind not in NUMBERS]

# The root of the mean square error of normal values may be this share of theirs: that of a uniform
# quantizer of as many levels over plus and minus 3.5 deviations would be 2.02 / levels.
LARGEST_ERROR = {
    GGMLType.Q2_K: 0.31,
    GGMLType.Q3_K: 0.17,
    GGMLType.Q4_0: 0.095,
    GGMLType.Q4_1: 0.082,
    GGMLType.Q4_K: 0.076,
    GGMLType.IQ4_NL: 0.078,
    GGMLType.MXFP4: 0.12,
    GGMLType.Q5_0: 0.047,
    GGMLType.Q5_1: 0.041,
    GGMLType.Q5_K: 0.038,
    GGMLType.Q6_K: 0.02,
    GGMLType.Q8_0: 0.006,
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """Rows, importances, and what llama.cpp's quantizer makes of them."""
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def decoded(encoded: np.ndarray, kind: GGMLType, rows: np.ndarray) -> np.ndarray:
    return dequantize(encoded.reshape(-1), kind, rows.shape)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_bytes_are_llama_cpps(golden: dict[str, np.ndarray], kind: GGMLType):
    cases = [name.partition("/")[2] for name in golden if name.startswith(f"{kind.name}/")]
    assert "none" in cases
    assert len(cases) == (1 if kind in (GGMLType.Q8_0, GGMLType.MXFP4) else 4)
    for case in cases:
        importance = None if case == "none" else golden[case]
        found = encode(golden["rows"], kind, importance)
        wrong = (found != golden[f"{kind.name}/{case}"]).any(axis=1)
        assert not wrong.any(), f"{case}: rows {np.flatnonzero(wrong)}"


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_bytes_are_the_installed_llama_cpps(kind: GGMLType):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import llama_quantizer

    rng = np.random.default_rng(kind)
    rows = rng.standard_t(4, (8, 1024)).astype(np.float32)
    importance = rng.standard_exponential(1024, np.float32)
    for each in (None, importance):
        np.testing.assert_array_equal(encode(rows, kind, each), llama_quantizer.encode(rows, kind, each))


@pytest.mark.parametrize("kind", [GGMLType.BF16, GGMLType.Q4_1, GGMLType.Q4_K], ids=lambda kind: kind.name)
def test_bytes_do_not_depend_on_how_rows_are_divided(kind: GGMLType):
    rows = np.random.default_rng(0).standard_normal((5, CHUNK // 4 * 3), np.float32)
    assert tensor_bytes("a tensor", rows, kind) == encode(rows, kind).tobytes()
    rows[4, -1] = np.inf
    with pytest.raises(ModelFileError, match=r"^a tensor: 1 values are infinite"):
        tensor_bytes("a tensor", rows, kind)


def test_the_golden_rows_are_what_their_script_makes(golden: dict[str, np.ndarray]):
    np.testing.assert_array_equal(golden["rows"], make_golden_encodings.rows())


@pytest.mark.parametrize(
    "kind", [k for k in ENCODERS if k.name in ("Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32")]
)
def test_bytes_are_gguf_pys(golden: dict[str, np.ndarray], kind: GGMLType):
    theirs = gguf_py.quantize(golden["rows"], gguf_py.GGMLQuantizationType(kind))
    np.testing.assert_array_equal(
        encode(golden["rows"], kind), theirs.view(np.uint8).reshape(len(theirs), -1)
    )


def test_fixtures_are_encoded_as_ggml_encodes_them(fixtures):
    seen = set()
    for kind in BLOCKS:
        arrays = np.load(fixtures / "quant" / f"{kind.name.lower()}.npz")
        assert "imatrix" not in str(arrays["method"]), arrays["method"]
        np.testing.assert_array_equal(encode(arrays["source"], kind), arrays["raw"], kind.name)
        seen.add(kind)
    assert len(seen) == len(BLOCKS)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_normal_values_come_back_near(kind: GGMLType):
    rows = np.random.default_rng(7).standard_normal((16, 1024), np.float32)
    error = np.sqrt(np.mean((decoded(encode(rows, kind), kind, rows) - rows) ** 2))
    assert LARGEST_ERROR[kind] / 1.3 < error < LARGEST_ERROR[kind]


@pytest.mark.parametrize("kind", [k for k in BLOCKS if k not in (GGMLType.Q8_0, GGMLType.MXFP4)])
def test_importance_lowers_the_weighted_error(kind: GGMLType):
    rng = np.random.default_rng(8)
    rows = rng.standard_t(5, (8, 1024)).astype(np.float32)
    importance = np.exp(2 * rng.standard_normal(1024)).astype(np.float32)

    def error(weights: np.ndarray | None) -> float:
        off = decoded(encode(rows, kind, weights), kind, rows) - rows
        return float((importance * off * off).sum())

    assert error(importance) < 0.97 * error(None)


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_row_is_encoded_by_itself(kind: GGMLType):
    rows = np.random.default_rng(9).standard_normal((5, 256), np.float32)
    whole = encode(rows, kind)
    np.testing.assert_array_equal(np.vstack([encode(rows[i : i + 1], kind) for i in range(5)]), whole)


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_what_means_nothing_comes_back_as_nothing(kind: GGMLType):
    tiny = np.random.default_rng(3).standard_normal((1, 256)) * 1e-40
    for rows in (np.zeros((1, 256)), -np.zeros((1, 256)), tiny):
        for importance in (None, np.ones(256, np.float32), np.zeros(256, np.float32)):
            values = rows.astype(np.float32)
            found = decoded(encode(values, kind, importance), kind, values)
            assert np.abs(found).max() <= 1e-39


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_is_refused(kind: GGMLType, value: float):
    rows = np.ones((2, 256), np.float32)
    rows[1, 200] = value
    with pytest.raises(ModelFileError, match="1 values are infinite or not a number"):
        encode(rows, kind)


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_values_that_a_type_cannot_hold_are_refused(kind: GGMLType):
    rows = np.linspace(-3e38, 3e38, 512, dtype=np.float32).reshape(2, 256)
    if kind in (GGMLType.F32, GGMLType.BF16, GGMLType.MXFP4):
        assert np.abs(decoded(encode(rows, kind), kind, rows) - rows).max() < 0.35 * 3e38
        return
    for importance in (None, np.ones(256, np.float32)):
        with pytest.raises(ModelFileError, match=rf"values up to 3e\+38 are too large for {kind.name}"):
            encode(rows, kind, importance)


@pytest.mark.parametrize("weight", [1e31, np.inf, np.nan])
def test_importance_beyond_float32_is_refused(weight: float):
    rows, importance = np.ones((1, 256), np.float32), np.ones(256, np.float32)
    importance[3] = weight
    with pytest.raises(ModelFileError, match=r"importance up to .* is too large for values up to 1"):
        encode(rows, GGMLType.Q4_K, importance)


@pytest.mark.parametrize(("run", "width"), [(16, 4), (32, 4), (64, 4), (32, 2), (32, 1), (4, 2), (8, 4)])
def test_packing_undoes_unpacking(run: int, width: int):
    data = np.random.default_rng(0).integers(0, 256, (3, run * 4), np.uint8)
    np.testing.assert_array_equal(packed(planes(data, run, width), run, width), data)


def test_six_bit_scales_undo_their_bytes():
    scales, minima = np.random.default_rng(0).integers(0, 64, (2, 5, 8), np.uint8)
    for found, wanted in zip(six_bit_scales(six_bit_bytes(scales, minima)), (scales, minima), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_sums_go_from_the_first_value_to_the_last():
    for groups in (1, 2, 7, 300):
        values = np.random.default_rng(groups).standard_normal((32, groups)).astype(np.float32)
        wanted = np.zeros(groups, np.float32)
        for row in values:
            wanted += row
        np.testing.assert_array_equal(search.total(values), wanted)


def test_sizes_are_those_of_the_types():
    rows = np.ones((3, 512), np.float32)
    for kind in ENCODERS:
        block = BLOCK_SIZES[kind]
        assert encode(rows, kind).shape == (3, 512 // block.elements * block.nbytes)
