"""Quantized files: llama.cpp's mixes, every type loads and is near, all else is kept; errors are one line."""

from pathlib import Path
from typing import Any

import make_golden_mixes
import numpy as np
import pytest
from command_line import realm
from tiny import write_model

from realm_jax import LLM, gguf
from realm_jax.cli.tensor_types import NAMES
from realm_jax.errors import ModelFileError, RequestError, UnsupportedError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer
from realm_jax.quant import dequantize
from realm_jax.quant.encoding import ENCODERS, encode
from realm_jax.quantization.file_types import FILE_TYPES, FileType, file_type_of, fitting
from realm_jax.quantization.importance import ImportanceMatrix
from realm_jax.quantization.mixes import Facts, Mix
from realm_jax.quantization.requantizing import Quantization

# How far the logits of the model below are off, against their spread: its random weights make much of it.
LOGITS_ERROR = {
    **{"F32": 0.0, "F16": 0.0014, "BF16": 0.011, "Q8_0": 0.036, "MXFP4_MOE": 0.036, "Q6_K": 0.12},
    **{"Q5_0": 0.27, "Q5_1": 0.25, "Q5_K_S": 0.24, "Q5_K_M": 0.24, "Q4_K_S": 0.41, "Q4_K_M": 0.41},
    **{"Q4_0": 0.51, "Q4_1": 0.44, "IQ4_NL": 0.49, "MXFP4": 0.65, "Q3_K_L": 0.74, "Q3_K_M": 0.75},
    **{"Q3_K_S": 0.82, "Q2_K": 1.04, "Q2_K_S": 1.1},
}
KEPT_KEYS = {"general.file_type", "general.quantization_version"}
Q = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama whose rows are multiples of 256."""
    return write_model(tmp_path_factory.mktemp("quantize") / "f32.gguf", width=256, ffn=512)


@pytest.fixture(scope="module")
def matrix(model: Path) -> ImportanceMatrix:
    """Random importance of every matrix."""
    rng = np.random.default_rng(0)
    with gguf.open(model) as file:
        means = {
            info.name: rng.standard_exponential(info.shape[-1], np.float32)
            for info in file.tensors.values()
            if len(info.shape) == 2 and info.name.startswith("blk")
        }
    return ImportanceMatrix(Path("imatrix.gguf"), means, 3, ["text.txt"])


def values(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return dequantize(file.data(name), info.ggml_type, info.shape)


def info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, shape, GGMLType.F32, 0, 0)


@pytest.mark.parametrize("case", make_golden_mixes.LAYERS)
def test_mixes_are_llama_cpps(case: str):
    tensors = [info(name, shape) for name, shape in make_golden_mixes.shapes(case).items()]
    name = make_golden_mixes.architecture(case)
    metadata: dict[str, Any] = {f"{name}.{k}": v for k, v in make_golden_mixes.metadata(case).items()}
    metadata["general.architecture"] = name
    seen = set()
    with np.load(make_golden_mixes.GOLDEN) as golden:
        for key in golden.files:
            whose, kind, importance = key.split("/")
            if whose != case:
                continue
            names = [each.name for each in tensors]
            facts = Facts.of(metadata, names, "a file", has_importance=importance == "importance")
            types = Mix(FILE_TYPES[kind], facts).types(tensors)
            found = {each.name: fitting(types[each.name], each.shape[-1]) for each in tensors}
            wanted = dict(zip(names, map(GGMLType, golden[key].tolist()), strict=True))
            if kind == "MXFP4":  # llama.cpp has no such mix: the golden one's embedding was asked for
                found["token_embd.weight"] = wanted["token_embd.weight"]
            assert found == wanted, key
            seen.add(kind)
    assert seen == set(FILE_TYPES)


def test_what_stands_in_is_in_llama_cpps_table():
    wanted = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q4_0": "Q4_0"}
    for kind, other in wanted.items():
        assert fitting(GGMLType[kind], 96) is GGMLType[other]
        assert fitting(GGMLType[kind], 40) is GGMLType.F16
        assert fitting(GGMLType[kind], 512) is GGMLType[kind]
    assert fitting(GGMLType.BF16, 7) is GGMLType.BF16


def logits(path: Path) -> np.ndarray:
    return LLM(path, dtype="float32", ctx_size=64).logits(range(3, 35))


@pytest.fixture(scope="module")
def wanted(model: Path) -> np.ndarray:
    """The model's logits."""
    return logits(model)


@pytest.mark.parametrize("kind", FILE_TYPES.values(), ids=FILE_TYPES)
def test_every_type_loads_and_is_near(
    model: Path, matrix: ImportanceMatrix, wanted: np.ndarray, tmp_path: Path, kind: FileType
):
    target = tmp_path / "out.gguf"
    importance = matrix if kind.name == "Q2_K_S" else None
    with gguf.open(model) as file:
        job = Quantization(file, kind, importance)
        job.write(target)
        with gguf.open(target) as new:
            assert new.metadata["general.file_type"] == kind.number
            assert new.metadata["general.quantization_version"] == 2
            kept = [key for key in file.metadata if key not in KEPT_KEYS]
            theirs, ours = writer.raw_metadata(model), writer.raw_metadata(target)
            assert {key: theirs[key] for key in kept} == {key: ours[key] for key in kept}
            assert list(new.tensors) == list(file.tensors)
            main = [i for i in new.tensors.values() if i.ggml_type is kind.kind]
            assert len(main) >= 4 or kind.name == "MXFP4_MOE"
            assert {i.ggml_type for i in new.tensors.values() if len(i.shape) == 1} == {GGMLType.F32}
    error = (logits(target) - wanted).std() / wanted.std()
    assert 0.7 * LOGITS_ERROR[kind.name] <= error <= 1.2 * LOGITS_ERROR[kind.name]


def test_the_bytes_are_the_encoders_whatever_the_threads(
    model: Path, matrix: ImportanceMatrix, tmp_path: Path
):
    files = [tmp_path / f"{threads}.gguf" for threads in (1, 3)]
    with gguf.open(model) as file:
        for threads, path in zip((1, 3), files, strict=True):
            Quantization(file, FILE_TYPES["Q4_K_M"], matrix, threads=threads).write(path)
        with gguf.open(files[0]) as new:
            for name in (Q, "blk.1.ffn_down.weight", "output.weight"):
                importance = matrix.means.get(name)
                wanted = encode(values(file, name), new.tensors[name].ggml_type, importance)
                np.testing.assert_array_equal(new.data(name), wanted.reshape(-1))
            found = new.metadata
    assert files[0].read_bytes() == files[1].read_bytes()
    assert found["quantize.imatrix.file"] == "imatrix.gguf"
    assert found["quantize.imatrix.dataset"] == "text.txt"
    assert found["quantize.imatrix.entries_count"] == len(matrix.means)
    assert found["quantize.imatrix.chunks_count"] == 3


def test_experts_have_importance_of_their_own(fixtures: Path, tmp_path: Path):
    name, rng = "blk.0.ffn_gate_exps.weight", np.random.default_rng(0)
    with gguf.open(fixtures / "arch" / "llama-moe" / "model.gguf") as file:
        experts, rows, columns = file.tensors[name].shape
        each = np.exp(2 * rng.standard_normal((experts, columns))).astype(np.float32)
        matrix = ImportanceMatrix(Path("i"), {name: each.reshape(-1)}, 1, [])
        Quantization(file, FILE_TYPES["Q4_0"], matrix, pure=True).write(tmp_path / "out.gguf")
        source = values(file, name)
    with gguf.open(tmp_path / "out.gguf") as new:
        data = new.data(name).reshape(experts, rows, -1)
    for expert in range(experts):
        np.testing.assert_array_equal(data[expert], encode(source[expert], GGMLType.Q4_0, each[expert]))
    assert len(np.unique(each, axis=0)) == experts


def test_options_say_types(model: Path, tmp_path: Path):
    target = tmp_path / "out.gguf"
    flags = ("--output-tensor-type", "q5_k", "--token-embedding-type", "Q8_0", "--pure", "-t", "1")
    done = realm("quantize", model, target, "q4_k", *flags)
    assert (done.code, done.out) == (0, f"{target}\n"), done.err
    with gguf.open(target) as new:
        kinds = {name: each.ggml_type.name for name, each in new.tensors.items() if len(each.shape) == 2}
        assert new.metadata["general.file_type"] == 15
    assert (kinds.pop("output.weight"), kinds.pop("token_embd.weight")) == ("Q5_K", "Q8_0")
    assert set(kinds.values()) == {"Q4_K"}
    again = realm("quantize", target, tmp_path / "again.gguf", "Q3_K_S")
    assert "rounded already" in again.error and "--allow-requantize" in again.error
    allowed = realm("quantize", target, tmp_path / "again.gguf", "Q3_K_S", "--allow-requantize")
    assert allowed.code == 0, allowed.err


def test_every_type_has_a_name_for_flags():
    assert NAMES.split(", ") == [kind.name for kind in ENCODERS]
    assert {file_type_of(kind).kind for kind in ENCODERS} == set(ENCODERS)
    with pytest.raises(UnsupportedError, match=r"cannot be written as IQ1_S; there are F32, F16"):
        file_type_of(GGMLType.IQ1_S)


def test_what_stands_in_is_said(fixtures: Path, tmp_path: Path):
    source, target = fixtures / "stories260K" / "model.gguf", tmp_path / "out.gguf"
    done = realm("quantize", source, target, "Q4_K_M")
    assert "note: rows of 64 do not fit Q4_K, Q5_0 instead: blk.0.attn_k.weight" in done.err
    assert "rows of 172 do not fit Q6_K, F16 instead" in done.err
    with gguf.open(target) as ours, gguf.open(fixtures / "stories260K" / "model-Q4_K_M.gguf") as theirs:
        assert ours.metadata.keys() == theirs.metadata.keys()
        for name, wanted in theirs.tensors.items():
            assert ours.tensors[name].ggml_type == wanted.ggml_type, name
            np.testing.assert_array_equal(ours.data(name), theirs.data(name), name)


def test_what_is_no_number_is_refused_by_name_and_leaves_no_file(tmp_path: Path):
    source = write_model(tmp_path / "f32.gguf", layers=1)
    with gguf.open(source) as file:
        start = file.tensors["blk.0.ffn_down.weight"].offset
    data = bytearray(source.read_bytes())
    data[start + 400 : start + 404] = np.float32(np.nan).tobytes()
    source.write_bytes(data)
    done = realm("quantize", source, tmp_path / "out.gguf", "Q8_0")
    assert done.error == (
        "f32.gguf: blk.0.ffn_down.weight: 1 values are infinite or not a number; "
        "only numbers can be quantized"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["f32.gguf"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("MODEL out.gguf Q9_X", "TYPE is 'Q9_X'; it is one of F32, F16, BF16, Q4_0"),
        ("MODEL out.gguf", "Missing argument 'TYPE'"),
        ("MODEL MODEL Q4_0", "is what is read, and would be overwritten; give another path"),
        (
            "MODEL out.gguf Q4_0 --output-tensor-type IQ1_S",
            "--output-tensor-type is 'IQ1_S'; it is one of F32",
        ),
        (
            "MODEL out.gguf Q4_0 --imatrix MODEL",
            "general.type is None; an importance matrix has 'imatrix'",
        ),
        ("MODEL out.gguf Q4_0 --imatrix missing", "missing: cannot be read: No such file"),
        ("MODEL out.gguf Q2_K_S", "Q2_K_S needs the importance of blk.0.attn_q.weight (give --imatrix"),
        ("MODEL no/folder/out.gguf Q4_0", "no/folder/out.gguf: there is no folder no/folder; make it first"),
        ("missing.gguf out.gguf Q4_0", "missing.gguf"),
        ("MODEL out.gguf Q4_0 -t 0", "greater than or equal to 1, not '0'"),
    ],
)
def test_errors_are_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, said: str
):
    monkeypatch.chdir(tmp_path)
    done = realm("quantize", *(str(model) if word == "MODEL" else word for word in arguments.split()))
    error = done.err.splitlines()[-1]
    assert done.code in (1, 2)
    assert error.startswith("error: ") and said in error, error
    assert list(tmp_path.iterdir()) == []


def test_importance_of_another_model_is_refused(model: Path):
    with gguf.open(model) as file:
        wrong = ImportanceMatrix(Path("other.gguf"), {Q: np.ones(64, np.float32)}, 1, [])
        with pytest.raises(ModelFileError, match=r"other.gguf: .*attn_q.weight has 64 values; .* needs 256"):
            Quantization(file, FILE_TYPES["Q4_0"], wrong).check()
            _ = Quantization(file, FILE_TYPES["Q4_0"], wrong).unweighted
        embedding = ImportanceMatrix(Path("o"), {"token_embd.weight": np.ones(3, np.float32)}, 1, [])
        assert "token_embd.weight" in Quantization(file, FILE_TYPES["Q4_0"], embedding).unweighted


@pytest.mark.parametrize("key", ["llama.block_count", "llama.attention.head_count_kv"])
@pytest.mark.parametrize("value", [-1, 1 << 40, "x", 0.5])
def test_facts_are_checked(key: str, value: object):
    metadata = {"general.architecture": "llama", "llama.block_count": 2, key: value}
    with pytest.raises(ModelFileError, match=key):
        Facts.of(metadata, [], "a file", has_importance=False)


def test_requantizing_needs_leave(fixtures: Path, tmp_path: Path):
    with gguf.open(fixtures / "stories260K" / "model-Q8_0.gguf") as file:
        with pytest.raises(RequestError, match=r"is Q8_0, rounded already"):
            Quantization(file, FILE_TYPES["Q4_0"]).write(tmp_path / "out.gguf")
        Quantization(file, FILE_TYPES["Q8_0"]).write(tmp_path / "same.gguf")  # nothing changes
        with gguf.open(tmp_path / "same.gguf") as same:
            assert all((same.data(name) == file.data(name)).all() for name in file.tensors)
