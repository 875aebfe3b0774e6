"""Importance matrices: the squares of a NumPy model, llama.cpp's file; hostile ones refused in one line."""

import struct
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest
from command_line import realm
from numpy_llama import NumpyLlama

from realm_jax import LLM
from realm_jax.errors import ModelFileError, RequestError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import writer
from realm_jax.gguf.writer import TensorPlan
from realm_jax.kernels import native
from realm_jax.quantization import importance
from realm_jax.quantization.importance import Squares
from realm_jax.quantization.observed import observe

TILE = 64
GATE = "blk.0.ffn_gate.weight"


@pytest.mark.parametrize(
    ("case", "options", "tolerance"),
    [("llama-moe", {"dtype": "float32"}, 2e-5), ("llama-gqa-tied", {"kernels": "native"}, 0.03)],
)
def test_squares_are_those_of_a_numpy_model(
    fixtures: Path, case: str, options: dict[str, Any], tolerance: float
):
    if options.get("kernels") == "native" and native.problem():
        pytest.skip(f"no native kernels: {native.problem()}")
    path = fixtures / "arch" / case / "model.gguf"
    model, llm = NumpyLlama(path), LLM(path, ctx_size=2 * TILE, **options)
    golden = np.load(path.with_name("expected.npz"))
    assert np.abs(model.logits(golden["tokens"].tolist()) - golden["logits"]).max() < 1e-4  # the oracle's
    model.inputs.clear()
    windows = np.random.default_rng(0).integers(3, 320, (2, 2 * TILE)).tolist()
    for window in windows:
        model.logits(window)
    done: list[int] = []
    squares = observe(llm.transformer, llm.model.params, llm.model.numerics, windows, done.append)
    assert done == [1, 2]
    assert {name for name, _ in model.inputs} == squares.keys()
    for (name, expert), rows in model.inputs.items():
        seen = np.concatenate(rows)
        assert squares[name].counts[expert] == len(seen)
        wanted = (seen**2).sum(axis=0)
        assert np.abs(squares[name].sums[expert] - wanted).max() <= tolerance * wanted.max()
    used = {name: 2 if "_exps" in name else 1 for name in squares}
    assert all(each.counts.sum() == used[name] * 4 * TILE for name, each in squares.items())


def test_windows_are_whole_tiles(fixtures: Path):
    llm = LLM(fixtures / "arch" / "llama-gqa-tied" / "model.gguf", dtype="float32", ctx_size=TILE)
    with pytest.raises(RequestError, match="a window is 70 tokens; it has to be a multiple of 64"):
        observe(llm.transformer, llm.model.params, llm.model.numerics, [[5] * 70])


def test_the_command_writes_llama_cpps_file(tiny_model: Path, tmp_path: Path):
    text, out = tmp_path / "text.txt", tmp_path / "imatrix.gguf"
    text.write_text("the quick brown fox jumps over the lazy dog " * 12)
    flags = ("-f", text, "-o", out, "-c", 128, "--chunks", 2, "--dtype", "float32")
    done = realm("imatrix", "-m", tiny_model, *map(str, flags))
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    assert "window 2 of 2" in done.err
    file = gguf_py.GGUFReader(out)
    keys = {key: field.contents() for key, field in file.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": [str(text)],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 128,
    }
    tensors = {each.name: each for each in file.tensors}
    assert len(tensors) == 2 * 2 * 7
    assert tensors[f"{GATE}.counts"].data.tolist() == [[256.0]]
    sums = tensors[f"{GATE}.in_sum2"]
    assert (sums.data.shape, sums.tensor_type) == ((1, 64), gguf_py.GGMLQuantizationType.F32)
    found = importance.read(out)
    np.testing.assert_array_equal(found.means[GATE], sums.data[0] / np.float32(256))
    assert (found.chunks, list(found.datasets)) == (2, [str(text)])
    used = realm("quantize", tiny_model, tmp_path / "q.gguf", "Q4_0", "--imatrix", out)
    assert used.code == 0, used.err
    assert "not in the importance matrix: token_embd.weight, output.weight" in used.err


def test_llama_cpp_quantizes_by_our_file(tiny_model: Path, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    import llama_quantizer

    from realm_jax import gguf
    from realm_jax.quantization.file_types import FILE_TYPES
    from realm_jax.quantization.requantizing import Quantization

    rng = np.random.default_rng(0)
    with gguf.open(tiny_model) as file:
        each = {
            info.name: Squares(np.exp(rng.standard_normal((1, info.shape[-1]))), np.array([7]))
            for info in file.tensors.values()
            if info.name.startswith("blk") and len(info.shape) == 2
        }
        importance.write(tmp_path / "i.gguf", each, chunks=1, chunk_size=7, dataset="x")
        matrix = importance.read(tmp_path / "i.gguf")
        Quantization(file, FILE_TYPES["Q5_1"], matrix).write(tmp_path / "ours.gguf")
    llama_quantizer.quantize(tiny_model, tmp_path / "theirs.gguf", FILE_TYPES["Q5_1"], matrix.means)
    with gguf.open(tmp_path / "ours.gguf") as ours, gguf.open(tmp_path / "theirs.gguf") as theirs:
        for name in theirs.tensors:
            np.testing.assert_array_equal(ours.data(name), theirs.data(name), name)


def written(path: Path, tensors: dict[str, np.ndarray], kind: str = "imatrix") -> Path:
    plans = [TensorPlan(name, values.shape, GGMLType.F32) for name, values in tensors.items()]
    data = [[values.astype("<f4").tobytes()] for values in tensors.values()]
    writer.write(path, {"general.type": writer.text_value(kind)}, plans, data)
    return path


def test_means_are_sums_by_counts_and_one_where_nothing_was_seen(tmp_path: Path):
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    counts = np.array([[2], [0], [4]], np.float32)
    path = written(tmp_path / "i.gguf", {"a.in_sum2": sums, "a.counts": counts})
    np.testing.assert_array_equal(
        importance.read(path).means["a"], [0, 0.5, 1, 1.5, 1, 1, 1, 1, 2, 2.25, 2.5, 2.75]
    )


ONE = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "nothing in this importance matrix"),
        ({"a": ONE}, "nothing in this importance matrix"),
        ({"a.in_sum2": ONE}, "'a.counts' is missing"),
        ({"a.counts": ONE}, "'a.in_sum2' is missing"),
        ({"a.in_sum2": ONE, "a.counts": np.ones((3, 1))}, "4 sums are no multiple of 3 counts"),
        ({"a.in_sum2": -ONE, "a.counts": ONE[:, :1]}, "holds -1.0; sums of squares are finite"),
        ({"a.in_sum2": np.nan * ONE, "a.counts": ONE[:, :1]}, "holds nan; sums of squares are finite"),
        ({"a.in_sum2": ONE, "a.counts": np.inf * ONE[:, :1]}, "'a.counts' holds inf"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray], said: str):
    with pytest.raises(ModelFileError, match=said):
        importance.read(written(tmp_path / "i.gguf", tensors))


def legacy(entries: dict[str, tuple[int, np.ndarray]], chunks: int = 5, text: str = "t.txt") -> bytes:
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        data = np.asarray(values, "<f4")
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, data.size)]
        parts.append(data.tobytes())
    return b"".join([*parts, struct.pack("<ii", chunks, len(text)), text.encode()])


LEGACY = legacy({"a": (2, np.arange(4)), "bb": (0, np.ones(3))})


def test_older_files_are_read(tmp_path: Path):
    path = tmp_path / "imatrix.dat"
    path.write_bytes(LEGACY)
    found = importance.read(path)
    np.testing.assert_array_equal(found.means["a"], [0, 0.5, 1, 1.5])
    np.testing.assert_array_equal(found.means["bb"], [1, 1, 1])
    assert (found.chunks, list(found.datasets)) == (5, ["t.txt"])


def test_a_cut_or_changed_file_is_refused_or_read(tmp_path: Path):
    path, rng = tmp_path / "i", np.random.default_rng(0)
    sums, counts = np.ones((2, 8), np.float32), np.ones((2, 1), np.float32)
    new = written(path, {"a.in_sum2": sums, "a.counts": counts}).read_bytes()
    broken = [data[:end] for data in (LEGACY, new) for end in range(0, len(data) - 1, 3)]
    for data in (LEGACY, new):
        for _ in range(300):
            changed = bytearray(data)
            for place in rng.integers(0, len(data), 2):
                changed[place] = rng.integers(0, 256)
            broken.append(bytes(changed))
    refused = 0
    for data in broken:
        path.write_bytes(data)
        try:
            found = importance.read(path)
            assert all(np.isfinite(values).all() for values in found.means.values())
        except ModelFileError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(broken) // 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "neither a GGUF file nor an older"),
        (b"hello there, this is no matrix", "number of entries is"),
        (struct.pack("<i", -1) + bytes(90), "number of entries is -1"),
        (struct.pack("<iii", 1, 1 << 30, 0) + bytes(90), "length of a name is 1,073,741,824"),
        (struct.pack("<ii4sii", 1, 4, b"name", 1, 1 << 30) + bytes(9), "number of values is 1,073,741,824"),
        (legacy({"a": (1, np.full(3, np.nan))}), "holds nan"),
    ],
)
def test_older_files_that_are_broken_say_what(tmp_path: Path, data: bytes, said: str):
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(ModelFileError, match=said):
        importance.read(tmp_path / "i.dat")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-f TEXT -c 512", "one window is 512"),
        ("-f TEXT -c 65", "a window is 65 tokens; it has to be a multiple of 64"),
        ("-f missing.txt", "missing.txt"),
        ("", "Missing option '-f' / '--file'"),
        ("-f TEXT -c 64 -o no/folder/i.gguf", "there is no folder no/folder; make it first"),
        ("-f TEXT --chunks 0", "greater than or equal to 1"),
    ],
)
def test_errors_of_the_command_are_one_line(tiny_model: Path, tmp_path: Path, flags: str, said: str):
    text = tmp_path / "text.txt"
    text.write_text("a fox " * 20)
    words = [str(text) if word == "TEXT" else word for word in flags.split()]
    done = realm("imatrix", "-m", tiny_model, *words)
    assert said in done.error
