"""The two containers hold every block format exactly, and take no more room than they should."""

from pathlib import Path

import numpy as np
import pytest

from realm_jax import quant
from realm_jax.errors import ModelFileError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quant.chunks import CHUNK
from realm_jax.quant.containers import pack, unpack

BLOCKS = [kind for kind, form in quant.FORMATS.items() if isinstance(form, quant.BlockFormat)]

# Bytes of the container per 256 values, counted by hand: codes + super-scales + group bytes [+ minima].
BYTES_PER_256 = {
    GGMLType.Q4_0: 128 + 8 * 2,
    GGMLType.Q4_1: 128 + 8 * 2 + 8 * 2,
    GGMLType.Q5_0: 256 + 8 * 2,
    GGMLType.Q5_1: 256 + 8 * 2 + 8 * 2,
    GGMLType.Q8_0: 256 + 8 * 2,
    GGMLType.Q8_1: 256 + 8 * 2,
    GGMLType.Q2_K: 128 + 2 + 16 + 2 + 16,
    GGMLType.Q3_K: 128 + 2 + 16,
    GGMLType.Q4_K: 128 + 2 + 8 + 2 + 8,
    GGMLType.Q5_K: 256 + 2 + 8 + 2 + 8,
    GGMLType.Q6_K: 256 + 2 + 16,
    GGMLType.Q8_K: 256 + 4,
    GGMLType.Q1_0: 128 + 2 * 2,
    GGMLType.Q2_0: 128 + 4 * 2,
    GGMLType.TQ1_0: 128 + 2,
    GGMLType.TQ2_0: 128 + 2,
    GGMLType.MXFP4: 128 + 8 * 4,
    GGMLType.NVFP4: 128 + 16 * 2,
    GGMLType.IQ4_NL: 128 + 8 * 2,
    GGMLType.IQ4_XS: 128 + 2 + 8,
    GGMLType.IQ3_S: 128 + 2 + 8,
    GGMLType.IQ3_XXS: 128 + 4 + 8,
    GGMLType.IQ2_S: 128 + 4 + 16,
    GGMLType.IQ2_XS: 128 + 4 + 16,
    GGMLType.IQ2_XXS: 128 + 4 + 8,
    GGMLType.IQ1_S: 128 + 4 + 8,
    GGMLType.IQ1_M: 128 + 4 + 16,
}
TABLE_BYTES = 16


def assert_exact(data: np.ndarray, kind: GGMLType, shape: tuple[int, ...]) -> None:
    packed = pack(data, kind, shape)
    assert packed is not None
    assert packed.shape == shape
    ours, theirs = unpack(packed), quant.dequantize(data, kind, shape)
    assert ours.dtype == np.float32
    same = (ours.view(np.uint32) == theirs.view(np.uint32)) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), f"{kind.name}: {np.count_nonzero(~same)} of {same.size} differ"


@pytest.mark.parametrize("kind", BLOCKS)
def test_unpack_of_pack_is_dequantize(kind: GGMLType):
    elements, nbytes = BLOCK_SIZES[kind]
    blocks = 2 * (CHUNK // elements + 6)  # more than two chunks
    data = np.random.default_rng(kind).integers(0, 256, blocks * nbytes, np.uint8)
    for shape in [(2, blocks * elements // 2), (2, blocks // 4, 2 * elements), (blocks * elements,)]:
        assert_exact(data, kind, shape)


def test_unpack_of_pack_is_dequantize_for_extreme_scales(fixtures: Path):
    seen = set()
    for path in fixtures.glob("quant/*.npz"):
        golden = np.load(path)
        kind = GGMLType(int(golden["type_id"]))
        if kind not in BLOCKS:
            continue
        for name in ("raw", "extreme_raw", "nonfinite_raw"):
            if name in golden:
                data = golden[name].view(np.uint8)
                assert_exact(
                    data,
                    kind,
                    (
                        len(data),
                        data.size // len(data) // BLOCK_SIZES[kind].nbytes * BLOCK_SIZES[kind].elements,
                    ),
                )
        seen.add(kind)
    assert seen == set(BLOCKS) - {GGMLType.Q8_1, GGMLType.Q8_K}


@pytest.mark.parametrize("kind", BLOCKS)
def test_sizes_are_as_counted(kind: GGMLType):
    elements, nbytes = BLOCK_SIZES[kind]
    rows = 64 * 256 // elements
    packed = pack(np.zeros(rows * nbytes, np.uint8), kind, (rows, elements))
    assert packed is not None
    assert packed.nbytes == 64 * BYTES_PER_256[kind] + (0 if packed.table is None else TABLE_BYTES)
    assert packed.super_group == elements // packed.super_scale.shape[-1]
    if packed.group_scale is not None:
        assert packed.group == elements // packed.group_scale.shape[-1]


def test_sizes_against_the_file():
    ratio = {
        kind: BYTES_PER_256[kind] * size.elements / 256 / size.nbytes
        for kind in BLOCKS
        for size in [BLOCK_SIZES[kind]]
    }
    within = {kind.name for kind, value in ratio.items() if value <= 1.05}
    assert within == {"Q4_0", "Q4_1", "Q8_0", "Q8_1", "Q4_K", "Q8_K", "IQ4_NL", "IQ4_XS"}
    wider = {kind.name for kind, value in ratio.items() if 1.05 < value <= 1.6}
    assert wider == {"Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q3_K", "IQ3_S", "IQ3_XXS", "MXFP4", "NVFP4"}
    print({kind.name: round(value, 2) for kind, value in sorted(ratio.items(), key=lambda item: item[1])})


def test_the_lower_half_of_a_byte_is_the_even_column():
    data = np.zeros(18, np.uint8)
    data[:2] = np.array([1], "<f2").view(np.uint8)
    data[2] = 0xF0  # value 0 is code 0, value 16 is code 15; the others are code 0
    packed = pack(data, GGMLType.Q4_0, (1, 32))
    assert packed is not None
    assert packed.codes[0].tolist() == [0] * 8 + [15] + [0] * 7
    assert unpack(packed)[0, [15, 16, 17]].tolist() == [-8, 7, -8]


def test_plain_numbers_have_no_container():
    for kind in set(GGMLType) - set(BLOCKS):
        assert pack(np.zeros(4 * BLOCK_SIZES[kind].nbytes, np.uint8), kind, (2, 2)) is None
    with pytest.raises(ModelFileError, match="data is 17 bytes"):
        pack(np.zeros(17, np.uint8), GGMLType.Q4_0, (1, 32))


def test_a_tensor_without_rows_packs():
    packed = pack(np.zeros(0, np.uint8), GGMLType.Q4_K, (0, 512))
    assert packed is not None
    assert packed.shape == unpack(packed).shape == (0, 512)
