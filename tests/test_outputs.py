"""A file that cannot be made, or would take an input's place, is refused before any work."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import realm
from hf_folders import golden
from peft_files import pair, write_adapter
from tiny import write_model

from realm_jax import gguf
from realm_jax.convert.orbax import Checkpoint
from realm_jax.errors import ModelFileError
from realm_jax.gguf import writer

COMMANDS = {
    "hf": "convert hf hf OUT",
    "quantize": "quantize m.gguf OUT Q8_0",
    "merge": "lora merge -m m.gguf --lora peft -o OUT",
    "imatrix": "imatrix -m m.gguf -f text.txt -c 64 -o OUT",
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    golden("qwen2", root).rename(root / "hf")
    model = write_model(root / "m.gguf", layers=1)
    write_adapter(root / "peft", pair("model.layers.0.self_attn.q_proj", 64, 64))
    (root / "text.txt").write_text("a fox " * 40)
    os.mkfifo(root / "pipe")
    with gguf.open(model) as file:
        Checkpoint(file).write(root / "checkpoint")
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_cannot_be_written(command: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    cases = {".": "is a folder", "/": "is a folder", "": "is a folder", "hf": "is a folder"}
    cases |= {"pipe": "no regular file", "none/x.gguf": "there is no folder none; make it first"}
    before = contents(here)
    for target, words in cases.items():
        done = realm(*(target if word == "OUT" else word for word in command.split()))
        assert words in done.error and done.code == 2
    assert contents(here) == before


@pytest.mark.parametrize(
    ("command", "target"),
    [
        ("hf", "hf/config.json"),
        ("hf", "hf/model.safetensors"),
        ("quantize", "m.gguf"),
        ("imatrix", "m.gguf"),
        ("imatrix", "text.txt"),
        ("merge", "m.gguf"),
    ],
)
def test_inputs_stay(command: str, target: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    before = contents(here)
    done = realm(*(target if word == "OUT" else word for word in COMMANDS[command].split()))
    assert "is what is read, and would be overwritten" in done.error
    assert contents(here) == before


def test_a_checkpoint_and_a_matrix_stay(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(here)
    before = contents(here)
    assert "is what is read" in realm("quantize", "checkpoint", "checkpoint/index.json", "Q8_0").error
    matrix = ("--imatrix", "text.txt")
    assert "is what is read" in realm("quantize", "m.gguf", "text.txt", "Q8_0", *matrix).error
    assert contents(here) == before


def test_a_path_without_a_name_is_an_error_of_files():
    with pytest.raises(ModelFileError, match="cannot be written"):
        writer.write(Path(), {}, [], [])


def test_a_disk_without_room_is_told_before_the_work(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 16))
    error = realm("quantize", here / "m.gguf", tmp_path / "out.gguf", "F16").error
    assert "bytes; 65,536 are free (make room, or give a path on another disk)" in error
    assert list(tmp_path.iterdir()) == []


def test_padding_takes_neither_memory_nor_disk(tmp_path: Path):
    """A file may ask for an alignment of gigabytes, which what is made of it keeps."""
    path, alignment = tmp_path / "sparse.gguf", 1 << 31
    plan = writer.TensorPlan("x.weight", (32,), writer.GGMLType.F32)
    metadata = {"general.alignment": writer.count_value(alignment)}
    writer.write(path, metadata, [plan], [[bytes(range(128))]], alignment=alignment)
    assert path.stat().st_size == 2 * alignment and path.stat().st_blocks < 1000
    with gguf.open(path) as file:
        assert file.data("x.weight").tobytes() == bytes(range(128))
