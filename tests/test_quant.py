"""Every GGML type against ggml's own numbers, bit for bit."""

import os
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from realm_jax import quant
from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quant.chunks import CHUNK

TYPES = list(GGMLType)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
GOLDEN = [("raw", "dequantized"), ("extreme_raw", "extreme"), ("nonfinite_raw", "nonfinite")]


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to the last bit, signs of zero too; any NaN equals any NaN."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    integers = f"u{ours.dtype.itemsize}"
    same = (ours.view(integers) == theirs.view(integers)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ"


def random_data(kind: GGMLType, count: int) -> np.ndarray:
    return np.random.default_rng(kind).integers(0, 256, count * BLOCK_SIZES[kind].nbytes, np.uint8)


def test_every_type_has_a_format_of_its_size():
    assert set(quant.FORMATS) == set(GGMLType) == set(BLOCK_SIZES)
    for kind, form in quant.FORMATS.items():
        match form:
            case quant.BlockFormat():
                assert (form.elements, form.layout.itemsize) == BLOCK_SIZES[kind]
            case quant.CastFormat():
                assert BLOCK_SIZES[kind] == (1, form.dtype.itemsize)


def test_equals_ggml(fixtures: Path):
    seen = set()
    for path in fixtures.glob("quant/*.npz"):
        golden = np.load(path)
        kind = int(golden["type_id"])
        for raw, values in GOLDEN:
            if raw not in golden:
                continue
            expected = golden[values]
            assert_same_bits(quant.dequantize(golden[raw].view(np.uint8), kind, expected.shape), expected)
            rounded = np.empty(expected.shape, BFLOAT16)
            quant.dequantize_into(golden[raw].view(np.uint8), kind, rounded)
            with np.errstate(all="ignore"):
                assert_same_bits(rounded, expected.astype(BFLOAT16))
        seen.add(GGMLType(kind))
    plain = {GGMLType.F32, GGMLType.F64, GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64}
    assert seen == set(GGMLType) - plain - {GGMLType.Q8_1, GGMLType.Q8_K}


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind in gguf.quants._type_traits])
def test_random_bytes_over_several_chunks_equal_gguf_py(kind: GGMLType):
    count = 2 * CHUNK // BLOCK_SIZES[kind].elements + 3
    data = random_data(kind, count)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(kind))
    assert_same_bits(quant.dequantize(data, kind, expected.shape), expected)


PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@pytest.mark.parametrize(("name", "dtype"), PLAIN.items())
def test_plain_numbers_are_cast(name: str, dtype: str):
    data = random_data(GGMLType[name], 3 * 5)
    with np.errstate(all="ignore"):
        expected = np.frombuffer(data.tobytes(), dtype).astype(np.float32).reshape(3, 5)
    assert_same_bits(quant.dequantize(data, GGMLType[name], (3, 5)), expected)


@pytest.mark.parametrize(("kind", "scale", "start"), [(GGMLType.Q8_1, "<f2", 4), (GGMLType.Q8_K, "<f4", 4)])
def test_8_bit_blocks_of_ggml_dot_products(kind: GGMLType, scale: str, start: int):
    elements, nbytes = BLOCK_SIZES[kind]
    data = random_data(kind, 50)
    expected = np.empty((50, elements), np.float32)
    with np.errstate(all="ignore"):
        for block, row in zip(data.reshape(50, nbytes), expected, strict=True):
            factor = np.frombuffer(block.tobytes(), scale, 1)[0].astype(np.float32)
            row[:] = [factor * np.float32(code) for code in block[start : start + elements].view(np.int8)]
    assert_same_bits(quant.dequantize(data, kind, (50, elements)), expected)


@pytest.mark.parametrize("kind", TYPES)
def test_any_shape_of_the_same_rows_gives_the_same_values(kind: GGMLType):
    elements = BLOCK_SIZES[kind].elements
    data = random_data(kind, 24)
    flat = quant.dequantize(data, kind, (24 * elements,))
    for shape in [(2, 12 * elements), (2, 3, 4 * elements), (4, 1, 2, 3 * elements)]:
        assert_same_bits(quant.dequantize(data.reshape(2, -1), kind, shape), flat.reshape(shape))
    assert quant.dequantize(data[:0], kind, (0, elements)).shape == (0, elements)


@pytest.mark.parametrize("kind", TYPES)
def test_data_of_another_length_is_refused(kind: GGMLType):
    elements = BLOCK_SIZES[kind].elements
    data = random_data(kind, 4)
    for wrong in (data[:-1], data[:0], np.append(data, np.uint8(0))):
        with pytest.raises(ModelFileError, match=f"data is {wrong.size} bytes; {kind.name} of shape"):
            quant.dequantize(wrong, kind, (2, 2 * elements))


def test_what_is_no_tensor_is_refused():
    data = np.zeros(18, np.uint8)
    with pytest.raises(ModelFileError, match="ggml type 99 is unknown"):
        quant.dequantize(data, 99, (32,))
    with pytest.raises(ModelFileError, match="blocks of 32"):
        quant.dequantize(data, GGMLType.Q4_0, (2, 16))
    with pytest.raises(ModelFileError, match="blocks of 32"):
        quant.dequantize(data, GGMLType.Q4_0, (-1, -32))
    assert quant.supported(2)
    assert not quant.supported(99)


def test_the_output_array_is_checked():
    data = np.zeros(2 * 18, np.uint8)
    for out in (np.empty((2, 32)), np.empty((32, 2), np.float32).T):
        with pytest.raises(ValueError, match="C-contiguous float32 or bfloat16"):
            quant.dequantize_into(data, GGMLType.Q4_0, out)


def test_memory_is_bounded_by_the_chunks():
    shape = (4096, 4096)
    data = np.zeros(shape[0] * shape[1] // 256 * 144, np.uint8)
    out = np.zeros(shape, BFLOAT16)
    tracemalloc.start()
    quant.dequantize_into(data, GGMLType.Q4_K, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (os.cpu_count() or 1) * 16 * CHUNK


FORKED = """
import os, numpy as np
from realm_jax import quant
from realm_jax.quant.chunks import CHUNK
data = np.zeros(4 * 2 * CHUNK, np.uint8)
expand = lambda: quant.dequantize(data, 0, (2 * CHUNK,))
expand()
child = os.fork()
if child == 0:
    expand()
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_expands_too():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", FORKED], env=environment, check=True, timeout=60)
