"""The container against gguf-py as reader and as writer, and against broken files."""

import json
import os
import struct
import subprocess
import sys
import time
import tracemalloc
from contextlib import closing
from pathlib import Path

import mutations
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter

from realm_jax import gguf
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import GGMLType

# The container of these is sound: what is wrong with them is for the modules above to find.
SOUND_CONTAINERS = {
    "arch-missing.gguf",
    "arch-unknown.gguf",
    "embedding-length-missing.gguf",
    "head-count-0.gguf",
    "head-count-not-dividing.gguf",
    "tensor-missing.gguf",
    "tensor-shape-mismatch.gguf",
    "token-array-too-long.gguf",
    "token-array-wrong-type.gguf",
}


def write(path: Path, writer_setup, **options) -> Path:
    with closing(GGUFWriter(path, "llama", **options)) as writer:
        writer_setup(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    return path


def assert_same_value(ours: object, theirs: object) -> None:
    if isinstance(ours, np.ndarray):
        ours = ours.tolist()
    assert type(ours) is type(theirs)
    assert ours == theirs


def assert_same_as_gguf_py(path: Path) -> None:
    reader = GGUFReader(path)
    with gguf.open(path) as file:
        theirs = {key: field.contents() for key, field in reader.fields.items()}
        own_keys = [key for key in theirs if not key.startswith("GGUF.")]
        assert list(file.metadata) == own_keys
        for key in own_keys:
            assert_same_value(file.metadata[key], theirs[key])
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(tensor.shape.tolist()[::-1])
            assert info.ggml_type == tensor.tensor_type
            assert info.offset == tensor.data_offset
            assert file.data(tensor.name).tobytes() == tensor.data.tobytes()
        assert file.nbytes == path.stat().st_size
        assert file.split_paths == [path]


def test_reads_every_model_as_gguf_py_does(fixtures: Path):
    paths = [*fixtures.glob("arch/*/model.gguf"), *fixtures.glob("lora/*/*.gguf")]
    paths += [fixtures / "tokenizer" / "ggml-vocab-llama-spm.gguf", fixtures / "bad" / "control-good.gguf"]
    assert len(paths) > 30
    for path in paths:
        assert_same_as_gguf_py(path)


@pytest.mark.parametrize("alignment", [1, 8, 32, 4096, 2**20])
def test_reads_what_gguf_py_writes_at_any_alignment(tmp_path: Path, alignment: int):
    def fill(writer: GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)
        for number, (kind, value) in enumerate(VALUES):
            writer.add_key_value(f"value.{number}", value, kind)
            writer.add_key_value(f"array.{number}", [value] * 3, GGUFValueType.ARRAY, sub_type=kind)
        for shape in [(3,), (2, 3), (5, 1, 7), (2, 3, 4, 5)]:
            writer.add_tensor(str(shape), np.random.default_rng(0).random(shape, np.float32))

    path = write(tmp_path / "model.gguf", fill)
    assert_same_as_gguf_py(path)
    for version in (2, 3):
        content = bytearray(path.read_bytes())
        content[4] = version
        path.write_bytes(content)
        assert gguf.open(path).version == version


VALUES = [
    (GGUFValueType.UINT8, 255),
    (GGUFValueType.INT8, -128),
    (GGUFValueType.UINT16, 65535),
    (GGUFValueType.INT16, -32768),
    (GGUFValueType.UINT32, 2**32 - 1),
    (GGUFValueType.INT32, -(2**31)),
    (GGUFValueType.FLOAT32, 0.5),
    (GGUFValueType.BOOL, True),
    (GGUFValueType.STRING, "Grüße 🙂\n"),
    (GGUFValueType.UINT64, 2**64 - 1),
    (GGUFValueType.INT64, -(2**63)),
    (GGUFValueType.FLOAT64, 1e300),
]


@pytest.fixture
def split_model(tmp_path: Path) -> tuple[list[Path], dict[str, np.ndarray]]:
    tensors = {f"t{n}": np.random.default_rng(n).random((2, n + 1), np.float32) for n in range(5)}

    def fill(writer: GGUFWriter) -> None:
        writer.add_string("general.name", "split")
        for name, value in tensors.items():
            writer.add_tensor(name, value)

    write(tmp_path / "model.gguf", fill, split_max_tensors=2)
    return sorted(tmp_path.glob("*.gguf")), tensors


def test_any_part_of_a_split_model_opens_the_whole(split_model):
    paths, tensors = split_model
    assert len(paths) == 3
    for path in paths:
        with gguf.open(path) as file:
            assert file.split_paths == paths
            assert file.nbytes == sum(path.stat().st_size for path in paths)
            assert file.metadata["general.name"] == "split"
            assert list(file.tensors) == list(tensors)
            for name, value in tensors.items():
                assert (
                    file.data(name).view("<f4").reshape(file.tensors[name].shape).tolist() == value.tolist()
                )


def test_broken_splits_name_what_is_wrong(split_model):
    paths, _ = split_model
    first, second, third = (path.read_bytes() for path in paths)
    paths[1].unlink()
    with pytest.raises(ModelFileError, match=r"missing beside it: model-00002-of-00003.gguf"):
        gguf.open(paths[0])
    paths[1].write_bytes(third)
    with pytest.raises(ModelFileError, match=r"split.no is 2; expected 1"):
        gguf.open(paths[0])
    paths[1].write_bytes(second)
    paths[2].write_bytes(first)
    with pytest.raises(ModelFileError, match=r"split.no is 0; expected 2"):
        gguf.open(paths[1])
    alone = paths[0].with_name("renamed.gguf")
    alone.write_bytes(first)
    with pytest.raises(ModelFileError, match=r"split.count is 3"):
        gguf.open(alone)
    paths[2].write_bytes(third.replace(b"t4", b"t3"))
    with pytest.raises(ModelFileError, match="'t3' stands twice"):
        gguf.open(paths[0])


def test_bad_files_fail_in_one_line_quickly_and_small(fixtures: Path):
    cases = json.loads((fixtures / "bad" / "cases.json").read_text())
    refused = set()
    for case in cases:
        tracemalloc.start()
        start = time.perf_counter()
        try:
            gguf.open(fixtures / "bad" / case["file"])
        except ModelFileError as error:
            refused.add(case["file"])
            assert str(error).startswith(f"{case['file']}: ")
            assert len(str(error).splitlines()) == 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert time.perf_counter() - start < 1
        assert peak < 10 * 2**20
    must_fail = {case["file"] for case in cases if case["expected"] == "must_fail"}
    assert refused == must_fail - SOUND_CONTAINERS | {"array-nested.gguf"}


def test_big_endian_is_refused_by_name(tmp_path: Path):
    path = write(tmp_path / "big.gguf", lambda writer: None, endianess=GGUFEndian.BIG)
    with pytest.raises(UnsupportedError, match="big-endian"):
        gguf.open(path)


def test_what_is_no_file_is_a_model_file_error(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in [("absent", "no such file"), (".", "no checkpoint"), ("pipe", "not a file")]:
        with pytest.raises(ModelFileError, match=message):
            gguf.open(tmp_path / name)


def test_empty_arrays_are_values(tmp_path: Path):
    path = tmp_path / "model.gguf"
    empty = {b"texts": struct.pack("<IIQ", 9, 8, 0), b"numbers": struct.pack("<IIQ", 9, 5, 0)}
    path.write_bytes(header(b"".join(mutations.text(key) + value for key, value in empty.items()), 2))
    with gguf.open(path) as file:
        assert file.metadata["texts"] == []
        assert file.metadata["numbers"].dtype == np.int32
        assert file.metadata["numbers"].size == 0


def header(keys: bytes = b"", key_count: int = 0, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, key_count) + keys + tensors


def tensor_entry(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return mutations.text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def test_overlaps_partial_blocks_and_zero_sizes_are_refused(tmp_path: Path):
    path = tmp_path / "model.gguf"
    cases = [
        ([tensor_entry(b"a", [16], 0, 0), tensor_entry(b"b", [8], 0, 32)], "'b': offset 128 is inside"),
        ([tensor_entry(b"a", [33], GGMLType.Q4_0, 0)], "rows of 33 are no multiple of Q4_0's 32"),
        ([tensor_entry(b"a", [8, 0], 0, 0)], "a dimension is 0"),
        ([tensor_entry(b"a", [2**63, 2**63], 0, 0)], "end beyond the file"),
    ]
    for entries, message in cases:
        content = header(tensors=b"".join(entries), tensor_count=len(entries))
        path.write_bytes(content.ljust(1024, b"\0"))
        with pytest.raises(ModelFileError, match=message):
            gguf.open(path)


def test_bytes_that_are_not_utf8_survive_in_vocabularies_only(tmp_path: Path):
    path = tmp_path / "model.gguf"
    value = struct.pack("<IIQ", 9, 8, 1) + mutations.text(b"\xff\xfe")
    path.write_bytes(header(mutations.text(b"tokenizer.ggml.tokens") + value, 1).ljust(256, b"\0"))
    (token,) = gguf.open(path).metadata["tokenizer.ggml.tokens"]
    assert token.encode(errors="surrogateescape") == b"\xff\xfe"
    path.write_bytes(header(mutations.text(b"general.tags") + value, 1).ljust(256, b"\0"))
    with pytest.raises(ModelFileError, match=r"'general.tags': string .* is not UTF-8"):
        gguf.open(path)


def test_data_is_a_read_only_view_that_outlives_the_file(fixtures: Path):
    with gguf.open(fixtures / "bad" / "control-good.gguf") as file:
        data = file.data("token_embd.weight")
        before = data.tobytes()
        assert not data.flags.owndata
        assert not data.flags.writeable
    assert data.tobytes() == before
    with gguf.open(fixtures / "bad" / "control-good.gguf") as file:
        pass
    with pytest.raises(ValueError, match="closed"):
        file.data("token_embd.weight")


def test_a_large_vocabulary_opens_in_half_a_second(tmp_path: Path):
    tokens = [f"token{number}ä" for number in range(152_000)]

    def fill(writer: GGUFWriter) -> None:
        writer.add_token_list(tokens)
        writer.add_token_merges([f"{token} {token}" for token in tokens])
        writer.add_token_types([1] * len(tokens))

    path = write(tmp_path / "vocabulary.gguf", fill)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with gguf.open(path) as file:
            seconds.append(time.perf_counter() - start)
            assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert min(seconds) < 0.5


@pytest.mark.parametrize("law", mutations.LAWS)
def test_mutated_files_end_as_error_or_as_readable_model(law: str) -> None:
    """Two thousand mutations, in a process of its own whose memory is capped."""
    repository = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, "-W", "error", str(Path(mutations.__file__)), law, "2000"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert outcomes["ModelFileError"] > 500
    assert outcomes["opened"] > 50
    assert outcomes["slowest_s"] < 1


def test_type_ids_are_those_of_ggml():
    for kind in GGMLType:
        if kind.name in GGMLQuantizationType.__members__:
            assert GGMLQuantizationType[kind.name] == kind
