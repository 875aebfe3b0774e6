"""Merged models: llama.cpp's logits with the adapters, every tensor folded or kept, all metadata kept."""

import json
import shutil
from pathlib import Path

import gguf as gguf_py
import numpy as np
import pytest
from command_line import realm
from peft_files import base_of, pair, write_adapter
from tiny import write_model

from realm_jax import LLM, gguf, lora
from realm_jax.cli.adapters import scaled
from realm_jax.errors import ModelFileError, RequestError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import writer
from realm_jax.lora import Adapter, LowRank
from realm_jax.lora.fold import fold
from realm_jax.quant import dequantize
from realm_jax.quant.encoding import ENCODERS, encode
from realm_jax.quantization import merging
from realm_jax.quantization.file_types import file_type_of
from realm_jax.quantization.merging import Merge
from realm_jax.quantization.requantizing import Quantization

Q4_0 = gguf_py.GGMLQuantizationType.Q4_0
Q = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("model", "adapters", "key"),
    [
        (
            "llama-mha",
            {"tiny-llama-mha/adapter1": 0.5, "tiny-llama-mha/adapter2/adapter.gguf": 2.0},
            "both_0.5_2.0",
        ),
        ("llama-gqa-tied", {"tiny-llama-gqa-tied/adapter.gguf": 1.0}, "scale_1.0"),
    ],
)
def test_a_merged_model_has_llama_cpps_logits(
    fixtures: Path, tmp_path: Path, model: str, adapters: dict[str, float], key: str
):
    base, merged = fixtures / "arch" / model / "model.gguf", tmp_path / "merged.gguf"
    flags = [
        flag for name, scale in adapters.items() for flag in ("--lora", f"{fixtures}/lora/{name}:{scale}")
    ]
    done = realm("lora", "merge", "-m", base, *flags, "-o", merged, "--type", "f32")
    assert (done.code, done.out) == (0, f"{merged}\n"), done.err
    expected = np.load(fixtures / "lora" / next(iter(adapters)).split("/")[0] / "expected.npz")
    logits = LLM(merged, dtype="float32", ctx_size=256).logits(expected["tokens"].tolist())
    assert np.abs(logits - expected[f"logits_{key}"]).max() < 1e-4
    assert np.abs(logits - expected["logits_base"]).max() > 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized llama, one of whose matrices has rows that are no multiple of 32."""
    folder = tmp_path_factory.mktemp("lora")
    kinds = {"attn_q": Q4_0, "attn_v": Q4_0, "output": Q4_0}
    with gguf.open(write_model(folder / "at-32.gguf", layers=1, ffn=40, kinds=kinds)) as file:
        keys = writer.raw_metadata(file.path) | {"general.alignment": writer.count_value(64)}
        plans = [writer.TensorPlan(info.name, info.shape, info.ggml_type) for info in file.tensors.values()]
        data = ([file.data(name).data] for name in file.tensors)
        writer.write(folder / "tiny.gguf", keys, plans, data, alignment=64)
    return folder / "tiny.gguf"


def random_adapters() -> list[tuple[Adapter, float]]:
    """A plain one, and one with DoRA and a norm of its own."""
    rng = np.random.default_rng(0)

    def delta(outputs: int, inputs: int) -> LowRank:
        return LowRank(
            rng.standard_normal((2, inputs), np.float32), rng.standard_normal((outputs, 2), np.float32), 0.5
        )

    norm = {"blk.0.ffn_norm.weight": rng.standard_normal(64, np.float32)}
    lengths = {Q: rng.uniform(1, 2, 64).astype(np.float32)}
    dora = Adapter("dora", {Q: delta(64, 64)}, norm, lengths)
    plain = {name: delta(*shape) for name, shape in ((Q, (64, 64)), ("blk.0.ffn_down.weight", (64, 40)))}
    return [(Adapter("plain", plain), 1.0), (dora, 0.5)]


def merged_tensors(
    model: Path, target: Path, kind: GGMLType | None
) -> dict[str, tuple[GGMLType, bytes, bytes]]:
    """For each tensor of the merged file its type, its bytes, and those that it should have."""
    adapters = random_adapters()
    with gguf.open(model) as file:
        Merge(file, adapters, kind).write(target)
        with gguf.open(target) as made:
            assert list(made.tensors) == list(file.tensors)
            return {
                name: (
                    info.ggml_type,
                    made.data(name).tobytes(),
                    wanted(file, name, info.ggml_type, adapters),
                )
                for name, info in made.tensors.items()
            }


def wanted(file: gguf.GGUFFile, name: str, kind: GGMLType, adapters: list[tuple[Adapter, float]]) -> bytes:
    info = file.tensors[name]
    if kind == info.ggml_type and not any(adapter.changes(name) for adapter, _ in adapters):
        return file.data(name).tobytes()
    values = fold(dequantize(file.data(name), info.ggml_type, info.shape), name, adapters, 0)
    return encode(values.reshape(-1, values.shape[-1]), kind).tobytes()


@pytest.mark.parametrize("values", [merging.VALUES, 256])
@pytest.mark.parametrize("kind", [None, *(GGMLType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0"))])
def test_every_tensor_is_folded_or_kept(
    model: Path, tmp_path: Path, kind: GGMLType | None, values: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(merging, "VALUES", values)  # so few that tensors are cut
    found = merged_tensors(model, tmp_path / "merged.gguf", kind)
    for name, (_, bytes_found, bytes_wanted) in found.items():
        assert bytes_found == bytes_wanted, name
    types = {name: each[0].name for name, each in found.items()}
    of_norms = {kind for name, kind in types.items() if "norm" in name}
    assert of_norms == {"F32"}
    if kind is None:
        assert types[Q] == "F16"
        assert types["blk.0.attn_v.weight"] == "Q4_0" and types["blk.0.ffn_down.weight"] == "F32"
    else:
        narrow = {"Q8_0": "F16", "Q4_0": "F16"}.get(kind.name, kind.name)  # rows of 40
        assert types.pop("blk.0.ffn_down.weight") == narrow
        assert {each for name, each in types.items() if "norm" not in name} == {kind.name}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of rows of 256 and of 96 values, in F32, and the same with adapters merged."""
    folder = tmp_path_factory.mktemp("wide")
    path = write_model(folder / "f32.gguf", layers=1, width=256, ffn=96, heads=2, kv_heads=1)
    base, merged = folder / "base.gguf", folder / "merged.gguf"
    with gguf.open(path) as file:
        Merge(file, [], GGMLType.F32).write(base)  # which says its type
        Merge(file, wide_adapters(), GGMLType.F32).write(merged)
    return base, merged


def wide_adapters() -> list[tuple[Adapter, float]]:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 256), np.float32), rng.standard_normal((256, 2), np.float32)
    return [(Adapter("wide", {Q: LowRank(a, b, 0.1)}), 0.5)]


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.name)
def test_a_type_is_what_quantize_makes_of_the_merged_model(
    wide: tuple[Path, Path], tmp_path: Path, kind: GGMLType
):
    base, merged = wide
    made, later = tmp_path / "made.gguf", tmp_path / "later.gguf"
    with gguf.open(base) as file:
        Merge(file, wide_adapters(), kind).write(made)
    with gguf.open(merged) as file:
        Quantization(file, file_type_of(kind), pure=True).write(later)
    assert made.read_bytes() == later.read_bytes()
    with gguf.open(made) as file:
        assert file.tensors[Q].ggml_type is kind
        for theirs in gguf_py.GGUFReader(made).tensors:
            info = file.tensors[theirs.name]
            ours = dequantize(file.data(theirs.name), info.ggml_type, info.shape)
            np.testing.assert_array_equal(gguf_py.dequantize(theirs.data, theirs.tensor_type), ours)


def test_routers_keep_their_type(fixtures: Path, tmp_path: Path):
    with gguf.open(fixtures / "arch" / "llama-moe" / "model.gguf") as file:
        Merge(file, [], GGMLType.Q4_0).write(tmp_path / "merged.gguf")
    with gguf.open(tmp_path / "merged.gguf") as made:
        types = {info.name.split(".", 2)[-1]: info.ggml_type.name for info in made.tensors.values()}
    assert (types["ffn_gate_inp.weight"], types["ffn_gate_exps.weight"]) == ("F32", "Q4_0")


def test_metadata_is_kept_byte_for_byte(model: Path, tmp_path: Path):
    before = writer.raw_metadata(model)
    for kind in (None, GGMLType.Q8_0):
        merged_tensors(model, tmp_path / "merged.gguf", kind)
        after = writer.raw_metadata(tmp_path / "merged.gguf")
        assert after.pop("general.quantization_version")[-4:] == b"\2\0\0\0"
        if kind:
            assert after.pop("general.file_type")[-4:] == b"\7\0\0\0"
        assert after == before
    reader = gguf_py.GGUFReader(tmp_path / "merged.gguf")
    assert all(tensor.data_offset % 64 == 0 for tensor in reader.tensors)


def test_a_split_model_becomes_one_file(model: Path, tmp_path: Path):
    with gguf.open(model) as file:
        parts, names = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)], list(file.tensors)
        for number, path in enumerate(parts):
            mine = names[number::2]
            plans = [writer.TensorPlan(n, file.tensors[n].shape, file.tensors[n].ggml_type) for n in mine]
            keys = writer.raw_metadata(model) if number == 0 else {}
            keys |= {"split.no": writer.count_value(number), "split.count": writer.count_value(2)}
            alignment = 64 if number == 0 else 32
            writer.write(path, keys, plans, ([file.data(n).data] for n in mine), alignment=alignment)
    for path in (model, parts[0]):
        merged_tensors(path, tmp_path / f"{path.stem}.merged", None)
    with gguf.open(tmp_path / "tiny.merged") as one, gguf.open(tmp_path / f"{parts[0].stem}.merged") as other:
        assert one.metadata.keys() == other.metadata.keys()
        assert one.tensors.keys() == other.tensors.keys()
        assert all((one.data(name) == other.data(name)).all() for name in one.tensors)


def test_values_that_the_type_cannot_hold_leave_no_file(model: Path, tmp_path: Path):
    pairs = {Q: LowRank(np.full((1, 64), 300, np.float32), np.full((64, 1), 300, np.float32), 1.0)}
    target = tmp_path / "merged.gguf"
    with (
        gguf.open(model) as file,
        pytest.raises(ModelFileError, match=r"attn_q\.weight: values up to 9000"),
    ):
        Merge(file, [(Adapter("big", pairs), 1.0)]).write(target)
    assert not list(tmp_path.iterdir())


def test_the_commands(model: Path, tmp_path: Path):
    peft = write_adapter(tmp_path / "peft", pair("model.layers.0.self_attn.q_proj", 64, 64))
    made, back = tmp_path / "made.gguf", tmp_path / "back"
    assert realm("lora", "convert", peft, made, "-m", model).out == f"{made}\n"
    assert realm("lora", "convert", made, back, "-m", model).out == f"{back}\n"
    assert lora.read(back, base_of(model)).deltas.keys() == {Q}
    for path, form in ((peft, "peft"), (made, "gguf"), (back / "adapter_model.safetensors", "peft")):
        facts = json.loads(realm("lora", "inspect", path, "-m", model, "--json").out)
        assert (facts["format"], facts["ranks"], facts["scales"]) == (form, {"4": 1}, [2.0])
        assert facts["tensors"] == {Q: 4} and facts["folded_only"] is False
    assert "rank          4 (1)" in realm("lora", "inspect", made).out
    (tmp_path / "full" / "adapter_model.safetensors").mkdir(parents=True)
    for source, target in (
        (peft, tmp_path / "no" / "folder.gguf"),
        (made, peft / "file"),
        (made, tmp_path / "full"),
    ):
        (peft / "file").touch()
        assert "cannot be written" in realm("lora", "convert", source, target, "-m", model).error


def test_wrong_usage_of_merge(model: Path, tmp_path: Path):
    out = tmp_path / "out.gguf"
    assert "give at least one --lora" in realm("lora", "merge", "-m", model, "-o", out).error
    copy = shutil.copy(model, tmp_path / "copy.gguf")
    adapter = write_adapter(tmp_path / "peft", pair("model.layers.0.self_attn.q_proj", 64, 64))
    done = realm("lora", "merge", "-m", copy, "--lora", adapter, "-o", copy)
    assert done.code == 2 and "is what is read" in done.error
    assert "no such file" in realm("lora", "merge", "-m", model, "--lora", "none:0.5", "-o", out).error
    done = realm("lora", "merge", "-m", model, "--lora", adapter, "-o", out, "--type", "q9")
    assert done.code == 2 and "--type is 'q9'; it is one of F32, F16, BF16, Q4_0" in done.error
    assert not out.exists()


def test_scales_stand_after_a_colon(tmp_path: Path):
    assert scaled("a.gguf") == (Path("a.gguf"), 1.0)
    assert scaled("a.gguf:-0.5") == (Path("a.gguf"), -0.5)
    assert scaled("a:b") == (Path("a:b"), 1.0)
    (tmp_path / "x:2").touch()
    assert scaled(f"{tmp_path}/x:2") == (tmp_path / "x:2", 1.0)
    with pytest.raises(RequestError, match="the scale is nan"):
        scaled("a.gguf:nan")
