"""Broken and hostile adapters end in one line that names what is wrong; nothing is unpickled or hangs."""

import json
import pickle
import struct
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mutations import mutate
from peft_files import ROOT, base_of, error_of, pair, write_adapter
from tiny import write_model

from realm_jax import lora
from realm_jax.errors import RealmError
from realm_jax.lora import Adapter, Base, LowRank
from realm_jax.lora.export import write_gguf
from realm_jax.lora.peft_config import USED

Q = "model.layers.0.self_attn.q_proj"
NAME = "blk.0.attn_q.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of(write_model(tmp_path_factory.mktemp("lora") / "tiny.gguf", layers=1))


ROWS = pair(Q, 64, 64)


def test_an_expression_that_takes_forever_is_stopped(base: Base, tmp_path: Path):
    folder = write_adapter(tmp_path, ROWS, rank_pattern={r"(([a-z_.0-9])+)+!": 4})
    start = time.perf_counter()
    assert "matching its regular expressions takes more than 2 s" in error_of(folder, base)
    assert time.perf_counter() - start < 30


class Bomb:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("is_zip", [True, False])
def test_pickles_are_refused_by_name(base: Base, tmp_path: Path, name: str, is_zip: bool):
    write_adapter(tmp_path, ROWS)
    (tmp_path / WEIGHTS).unlink()
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    if is_zip:
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", bomb)
    else:
        (tmp_path / name).write_bytes(bomb)
    for path in (tmp_path, tmp_path / name):
        assert f"{name}: is a pickle" in error_of(path, base)
    assert not (tmp_path / "exploded").exists()


def header(*entries: str, length: int | None = None, data: int = 0) -> bytes:
    text = ("{" + ",".join(entries) + "}").encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(name: str, shape: list[int], start: int, end: int) -> str:
    fields = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    return f"{json.dumps(ROOT + name)}: {json.dumps(fields)}"


A, B = entry(f"{Q}.lora_A.weight", [4, 64], 0, 1024), entry(f"{Q}.lora_B.weight", [64, 4], 1024, 2048)
HEADERS = {
    "length": (header(A, B, length=2**63), "header length is 9,223,372,036,854,775,808; the file has"),
    "short": (b"\1\0\0", "header length is 1; the file has 3 bytes"),
    "no json": (header("x"), "no safetensors header"),
    "deep": (header("[" * 100_000), "no safetensors header"),
    "twice": (header(A, A, B, data=2048), "lora_A.weight stands twice in the header"),
    "truncated": (header(A, B, data=2047), "Error while deserializing header"),
    "overlap": (header(A, B.replace("1024, 2048", "0, 1024"), data=1024), "Error while deserializing header"),
    "huge": (header(entry("x", [2**40, 2**40], 0, 0)), "overflow computing buffer size"),
    "no shape": (header('"x": {"dtype": "F32"}'), "x has no dtype and shape"),
    "empty": (header(), "changes nothing"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(case: str, base: Base, tmp_path: Path):
    content, message = HEADERS[case]
    write_adapter(tmp_path, ROWS)
    (tmp_path / WEIGHTS).write_bytes(content)
    assert message in error_of(tmp_path, base)


def test_a_header_has_a_limit(base: Base, tmp_path: Path):
    write_adapter(tmp_path, ROWS)
    with (tmp_path / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 1 << 30) + b"{")
        file.truncate(1 << 31)
    assert "header length is 1,073,741,824; the limit is 16,777,216" in error_of(tmp_path, base)


CONFIGS = {
    "[]": "holds no JSON object",
    "{": "no JSON",
    "[" * 100_000: "no JSON",
    '{"r": 4, "r": 8}': "a key stands twice",
    '{"r": true}': "r is True; it must be a whole number from 1",
    '{"target_modules": [[]]}': "it must be a list of names",
    '{"rank_pattern": []}': "has no tensors",
    '{"rank_pattern": [1]}': "it must be an object",
    '{"layers_to_transform": ["1"]}': "a list of layer numbers",
    '{"use_dora": 1}': "use_dora is 1; it must be true or false",
    '{"bias": "some"}': "bias is some; it must be one of none, all, lora_only",
}


@pytest.mark.parametrize("content", CONFIGS, ids=lambda content: content[:30])
def test_configurations(content: str, base: Base, tmp_path: Path):
    write_adapter(tmp_path, ROWS | pair("model.layers.0.mlp.up_proj", 96, 64))
    (tmp_path / CONFIG).write_text(
        content.replace('"rank_pattern": []', '"r": 4, "target_modules": ["proj"]')
    )
    message = CONFIGS[content].replace("has no tensors", "has tensors, but is not in target_modules")
    assert message in error_of(tmp_path, base)


def test_what_is_missing_is_said(base: Base, tmp_path: Path):
    assert "no such file" in error_of(tmp_path / "none.gguf", base)
    assert f"has no {WEIGHTS}" in error_of(tmp_path, base)
    write_adapter(tmp_path, ROWS)
    (tmp_path / CONFIG).unlink()
    assert f"{CONFIG}: no such file beside the adapter" in error_of(tmp_path, base)
    (tmp_path / "text.gguf").write_text("hello, this is no adapter at all")
    assert f"{CONFIG}: no such file" in error_of(tmp_path / "text.gguf", base)


def seed_files(base: Base, folder: Path) -> tuple[Path, Path]:
    """A valid adapter of each form."""
    rng = np.random.default_rng(0)
    tensors = {NAME: (64, 64), "blk.0.ffn_up.weight": (96, 64), "token_embd.weight": (320, 64)}
    pairs = {
        name: LowRank(rng.standard_normal((2, i), np.float32), rng.standard_normal((o, 2), np.float32), 0.5)
        for name, (o, i) in tensors.items()
    }
    write_gguf(Adapter("seed", pairs), base, folder / "seed.gguf")
    peft = write_adapter(folder / "seed", ROWS | pair("lm_head", 320, 64), bias="none", use_dora=False)
    return folder / "seed.gguf", peft


@pytest.mark.parametrize("target", ["seed.gguf", f"seed/{WEIGHTS}"])
def test_mutated_files_are_read_or_refused(base: Base, tmp_path: Path, target: str):
    for path in seed_files(base, tmp_path):
        lora.read(path, base)
    file, outcomes = tmp_path / target, Counter[str]()
    source = file.read_bytes()
    for seed in range(250):
        file.write_bytes(mutate(source, seed))
        outcomes[outcome(file, base)] += 1
    assert outcomes["read"] > 0 and outcomes["ModelFileError"] > 50


def outcome(path: Path, base: Base) -> str:
    """What became of the file: the error's name, or "read"."""
    try:
        lora.read(path, base)
        json.dumps(lora.summarize(path))
    except RealmError as error:
        assert len(str(error).splitlines()) == 1
        return type(error).__name__
    return "read"


JUNK = [
    None,
    True,
    0,
    -1,
    1 << 40,
    1e308,
    "x",
    "*",
    "é\n",
    [],
    [1],
    ["q_proj", None],
    {},
    {"x": 1},
    {"(": 2},
    [[]],
]


def test_any_value_of_any_field_is_read_or_refused(base: Base, tmp_path: Path):
    _, folder = seed_files(base, tmp_path)
    fields = json.loads((folder / CONFIG).read_text())
    outcomes = Counter[str]()
    for key in [*sorted(USED), "runtime_config", "lora_bias"]:
        for junk in JUNK:
            (folder / CONFIG).write_text(json.dumps(fields | {key: junk}))
            outcomes[outcome(folder, base)] += 1
    assert min(outcomes[name] for name in ("read", "ModelFileError", "UnsupportedError")) > 20
