"""A model as a directory of Orbax's form is the model: the same bytes, or an error."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as gguf_py
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from command_line import realm
from tiny import write_model

from realm_jax import gguf
from realm_jax.config import EngineConfig
from realm_jax.convert.orbax import Checkpoint
from realm_jax.errors import ModelFileError, RequestError
from realm_jax.gguf.checkpoint import CheckpointFile, standing_for
from realm_jax.loading import load_model
from realm_jax.quant import dequantize

KINDS: Any = dict.fromkeys(("attn_q", "ffn_down"), gguf_py.GGMLQuantizationType.Q8_0)
KINDS |= {"token_embd": gguf_py.GGMLQuantizationType.Q4_0, "ffn_up": gguf_py.GGMLQuantizationType.F16}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf", kinds=KINDS)


@pytest.fixture(scope="module")
def directory(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a directory, by the command line."""
    target = tmp_path_factory.mktemp("checkpoint") / "m"
    done = realm("convert", "orbax", model, target)
    assert (done.code, done.out) == (0, f"{target}\n"), done.err
    return target


def write(source: Path, target: Path, dense: Any = None) -> Path:
    with gguf.open(source) as file:
        Checkpoint(file, dense).write(target)
    return target


def test_bytes_and_metadata_are_those_of_the_file(model: Path, directory: Path):
    with gguf.open(model) as file, gguf.open(directory) as found:
        assert isinstance(found, CheckpointFile)
        assert {k: repr(v) for k, v in found.metadata.items()} == {
            k: repr(v) for k, v in file.metadata.items()
        }
        assert list(found.tensors) == list(file.tensors)
        for name, info in file.tensors.items():
            assert (found.tensors[name].shape, found.tensors[name].ggml_type) == (info.shape, info.ggml_type)
            assert found.data(name).tobytes() == file.data(name).tobytes()


def test_params_are_those_of_the_file(model: Path, directory: Path):
    config = EngineConfig(ctx_size=64, weights="dense")  # packed ones have room whose bytes mean nothing
    ours, theirs = (jax.tree.leaves_with_path(load_model(path, config).params) for path in (directory, model))
    assert [path for path, _ in ours] == [path for path, _ in theirs]
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and np.array_equal(np.asarray(one), np.asarray(other))


def test_commands_take_it_where_they_take_a_model(model: Path, directory: Path):
    asked = ("generate", "hello world", "--raw", "-n", 6, "--temperature", 0, "-c", 64, "-m")
    done = realm(*asked, directory)
    assert done.code == 0 and done.out == realm(*asked, model).out
    ours, theirs = (realm("tokenize", "hello", "--ids", "-m", path).out for path in (directory, model))
    assert ours == theirs != ""
    ours, theirs = (json.loads(realm("inspect", path, "--json").out) for path in (directory, model))
    for facts in (ours, theirs):
        del facts["file"], facts["file_bytes"]
    assert ours == theirs
    assert standing_for(directory).is_file()  # what batches and trainings know a model by


@pytest.mark.parametrize(("dense", "dtype"), [("bf16", ml_dtypes.bfloat16), ("f32", np.float32)])
def test_dense_arrays_are_the_values(dense: str, dtype: Any, model: Path, tmp_path: Path):
    """By their names and in their shapes, for whoever restores them with Orbax alone."""
    target = write(model, tmp_path / "dense", dense)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer, gguf.open(model) as file:
        arrays = checkpointer.restore(target / "tensors")
        for name, info in file.tensors.items():
            values = dequantize(file.data(name), info.ggml_type, info.shape)
            is_packed = info.ggml_type.name in ("Q8_0", "Q4_0")
            assert np.array_equal(np.asarray(arrays[name]), values.astype(dtype) if is_packed else values)
    with gguf.open(target) as found:
        assert {info.ggml_type.name for info in found.tensors.values()} == {"F16", "F32", dense.upper()}
        load_model(target, EngineConfig(ctx_size=64))


def test_any_flipped_byte_is_found(directory: Path, tmp_path: Path):
    """Loading a directory with one wrong byte, wherever it is, fails or gives the very same bytes."""
    with gguf.open(directory) as file:
        expected = {name: file.data(name).tobytes() for name in file.tensors}
        metadata = repr(file.metadata)
    files = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: (directory / path).stat().st_size)
    chance, found = random.Random(0), 0
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    for name in [*files, *files, *[largest] * 10]:
        data = bytearray((directory / name).read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (broken / name).write_bytes(data)
        try:
            with gguf.open(broken) as file:
                assert {each: file.data(each).tobytes() for each in file.tensors} == expected
                assert repr(file.metadata) == metadata
        except ModelFileError:
            found += 1
        (broken / name).write_bytes((directory / name).read_bytes())
    assert found > len(files)


@pytest.mark.parametrize("name", ["index.json", "header.gguf", "tensors", "tensors/manifest.ocdbt"])
def test_parts_that_are_missing(name: str, directory: Path, tmp_path: Path):
    partial = tmp_path / "partial"
    shutil.copytree(directory, partial)
    path = partial / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = realm("generate", "x", "-m", partial, "-c", 64).error
    assert "partial" in error and ("not complete" in error) == (name == "index.json")


Change = Callable[[dict[str, Any]], Any]
HUGE = {"name": "x", "type": "F32", "shape": [1 << 40, 1 << 40], "sha256": ""}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index.update(format="other"), "format is 'other'"),
        (lambda index: index.update(tensors={}), "tensors is no list"),
        (lambda index: index["tensors"].append(3), "no name of its own"),
        (lambda index: index["tensors"].append(index["tensors"][0]), "no name of its own"),
        (lambda index: index["tensors"].append(HUGE), "bytes of tensors; the directory has"),
        (lambda index: index["tensors"][0].update(shape=[0, 4]), r"shape is \[0, 4\]"),
        (lambda index: index["tensors"][0].update(shape=[-1]), r"shape is \[-1\]"),
        (lambda index: index["tensors"][0].update(type="Q99"), "unknown ggml type 'Q99'"),
        (lambda index: index["tensors"][0].update(shape=[320, 33]), "no multiple of"),
        (lambda index: index["tensors"][0].update(shape=[64, 320]), "cannot be read"),
        (lambda index: index["tensors"][0].update(type="F32"), "cannot be read"),
        (lambda index: index["tensors"][0].update(name="other"), "cannot be read"),
        (lambda index: index["tensors"][0].update(sha256="0" * 64), "checksum"),
        (lambda index: index.update(header="0" * 64), "header.gguf is not what was saved"),
    ],
)
def test_an_index_that_says_else(change: Change, words: str, directory: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    index = json.loads((other / "index.json").read_text())
    change(index)
    (other / "index.json").write_text(json.dumps(index))
    with pytest.raises(ModelFileError, match=words), gguf.open(other) as file:
        for name in file.tensors:
            file.data(name)


@pytest.mark.parametrize("name", ["header.gguf", "tensors/manifest.ocdbt", "tensors"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev")])
def test_what_is_no_file_is_not_read(
    name: str, make: Callable[[Path], None], directory: Path, tmp_path: Path
):
    """A pipe would wait for ever, and a linked folder is not counted."""
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    (other / name).rename(tmp_path / "moved")
    make(other / name)
    with pytest.raises(ModelFileError, match=f"'{name}' is neither a file nor a folder of its own"):
        gguf.open(other)


def test_an_index_of_any_size_is_not_parsed(directory: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    with (other / "index.json").open("r+b") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ModelFileError, match="16,777,217 bytes; the limit is 16,777,216"):
        gguf.open(other)


def test_a_folder_has_its_name_from_within(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = tmp_path / "other"
    shutil.copytree(directory, other)
    (other / "tensors" / "manifest.ocdbt").unlink()
    monkeypatch.chdir(other)
    with gguf.open(".") as file, pytest.raises(ModelFileError, match=r"^other: tensor"):
        file.data("output.weight")


def test_nothing_is_left_of_one_that_failed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 16))
        with pytest.raises(ModelFileError, match=r"takes 255,\d\d\d bytes; 65,536 are free \(make room"):
            write(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.Checkpointer, "save", full)
        with pytest.raises(ModelFileError, match="No space left"):
            write(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    write(model, tmp_path / "m")
    with pytest.raises(RequestError, match="is there already"):
        write(model, tmp_path / "m")


def test_other_folders_are_no_models(tmp_path: Path):
    assert "pass the .gguf file in it" in realm("generate", "x", "-m", tmp_path).error
    (tmp_path / "config.json").write_text("{}")
    assert "realm convert hf" in realm("generate", "x", "-m", tmp_path).error
