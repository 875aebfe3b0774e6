"""Adapters as files: both forms of one adapter are equal, and what is read is what was written."""

import json
from pathlib import Path

import numpy as np
import pytest
from peft_files import base_of
from safetensors.numpy import load_file
from tiny import write_model

from realm_jax import lora
from realm_jax.errors import UnsupportedError
from realm_jax.lora import Adapter, Base, LowRank
from realm_jax.lora.export import write_gguf, write_peft

CASES = {
    "tiny-llama-mha/adapter1": "llama-mha",
    "tiny-llama-mha/adapter2": "llama-mha",
    "tiny-llama-gqa-tied": "llama-gqa-tied",
    "smollm2": None,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, fixtures: Path, default_model: Path) -> tuple[Path, Base]:
    """A folder with one adapter in both forms, and its base."""
    model = CASES[request.param]
    path = default_model if model is None else fixtures / "arch" / model / "model.gguf"
    return fixtures / "lora" / request.param, base_of(path)


def assert_equal(one: Adapter, other: Adapter) -> None:
    """All arrays are equal, bit for bit, and all scales to float32's rounding."""
    assert one.deltas.keys() == other.deltas.keys()
    for name, delta in one.deltas.items():
        np.testing.assert_array_equal(delta.a, other.deltas[name].a, err_msg=name)
        np.testing.assert_array_equal(delta.b, other.deltas[name].b, err_msg=name)
        assert delta.scale == pytest.approx(other.deltas[name].scale, rel=1e-7), name
    for mine, theirs in ((one.replaced, other.replaced), (one.magnitudes, other.magnitudes)):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


def test_both_forms_of_an_adapter_are_equal(case: tuple[Path, Base]):
    folder, base = case
    from_gguf, from_peft = lora.read(folder / "adapter.gguf", base), lora.read(folder, base)
    assert len(from_gguf.deltas) > 3
    assert_equal(from_gguf, from_peft)


def test_peft_to_gguf_to_peft_gives_the_same_values(case: tuple[Path, Base], tmp_path: Path):
    folder, base = case
    write_gguf(lora.read(folder, base), base, tmp_path / "adapter.gguf")
    write_peft(lora.read(tmp_path / "adapter.gguf", base), base, tmp_path / "back")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].tobytes() == values.astype(np.float32).tobytes(), name
    old, new = (json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "back"))
    assert (new["r"], new["lora_alpha"]) == (old["r"], old["lora_alpha"])


def test_gguf_to_peft_to_gguf_gives_the_same_file(case: tuple[Path, Base], tmp_path: Path):
    folder, base = case
    write_gguf(lora.read(folder / "adapter.gguf", base), base, tmp_path / "1.gguf")
    write_peft(lora.read(folder / "adapter.gguf", base), base, tmp_path / "peft")
    write_gguf(lora.read(tmp_path / "peft", base), base, tmp_path / "2.gguf")
    one, two = (lora.read(tmp_path / name, base) for name in ("1.gguf", "2.gguf"))
    assert_equal(one, two)
    assert_equal(one, lora.read(folder / "adapter.gguf", base))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return base_of(write_model(tmp_path_factory.mktemp("lora") / "tiny.gguf"))


def random_pair(base: Base, name: str, rank: int, scale: float) -> LowRank:
    rng = np.random.default_rng(rank)
    outputs, inputs = base.shapes[name]
    a, b = rng.standard_normal((rank, inputs), np.float32), rng.standard_normal((outputs, rank), np.float32)
    return LowRank(a, b, scale)


def mixed(base: Base) -> Adapter:
    """Pairs whose ranks and scales all differ, as rank_pattern, alpha_pattern and rsLoRA make them."""
    scales = {
        "blk.0.attn_q.weight": (3, 16 / 3**0.5),
        "blk.0.attn_k.weight": (8, 16 / 8),
        "blk.1.attn_k.weight": (8, 16 / 8),
        "blk.0.ffn_down.weight": (1, 0.1),
        "blk.1.attn_v.weight": (5, 1.0),
        "blk.1.ffn_up.weight": (4, 0.0),
        "blk.1.ffn_gate.weight": (4, -0.3),
        "token_embd.weight": (6, 0.7),
        "output.weight": (2, 16 / 2**0.5),
    }
    pairs = {name: random_pair(base, name, rank, scale) for name, (rank, scale) in scales.items()}
    return Adapter("mixed", pairs, {"blk.0.attn_norm.weight": np.linspace(0, 1, 64, dtype=np.float32)})


def assert_same_change(one: Adapter, other: Adapter) -> None:
    assert one.deltas.keys() == other.deltas.keys()
    for name, delta in one.deltas.items():
        rows = len(delta.b)
        wanted = delta.scale * (delta.b.astype(np.float64) @ delta.a.astype(np.float64))
        found = other.deltas[name]
        np.testing.assert_allclose(
            found.scale * (found.b.astype(np.float64) @ found.a), wanted, rtol=1e-5, atol=1e-6, err_msg=name
        )
        np.testing.assert_array_equal(found.a, delta.a)
        # B itself is off by no more than two roundings to float32
        np.testing.assert_allclose(found.b * found.scale, delta.b * delta.scale, rtol=3e-7, atol=0)
        assert rows == len(found.b)
    for name, values in one.replaced.items():
        np.testing.assert_array_equal(values, other.replaced[name])


def test_gguf_says_every_scale_with_one_alpha(base: Base, tmp_path: Path):
    write_gguf(mixed(base), base, tmp_path / "mixed.gguf")
    read = lora.read(tmp_path / "mixed.gguf", base)
    assert_same_change(mixed(base), read)
    for name in ("blk.0.attn_k.weight", "blk.1.attn_k.weight"):  # whose alpha the file has
        np.testing.assert_array_equal(read.deltas[name].b, mixed(base).deltas[name].b)


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (1.0, 2.0, 1.0)])
def test_a_scale_of_one_or_zero_is_that_of_the_file(base: Base, tmp_path: Path, scales: tuple[float, ...]):
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    pairs = {n: random_pair(base, n, 2 + i, s) for i, (n, s) in enumerate(zip(names, scales, strict=True))}
    write_gguf(Adapter("a", pairs), base, tmp_path / "a.gguf")
    assert_same_change(Adapter("a", pairs), lora.read(tmp_path / "a.gguf", base))


def test_peft_says_every_scale_in_patterns(base: Base, tmp_path: Path):
    write_peft(mixed(base), base, tmp_path / "mixed")
    assert_equal(mixed(base), lora.read(tmp_path / "mixed", base))


def test_dora_and_whole_tensors_are_only_for_peft(base: Base, tmp_path: Path):
    name = "blk.0.attn_q.weight"
    magnitudes = {name: np.linspace(1, 2, 64, dtype=np.float32)}
    whole = {"output.weight": np.ones(base.shapes["output.weight"], np.float32)}
    adapter = Adapter("dora", {name: random_pair(base, name, 4, 0.5)}, whole, magnitudes)
    write_peft(adapter, base, tmp_path / "dora")
    assert_equal(adapter, lora.read(tmp_path / "dora", base))
    with pytest.raises(UnsupportedError, match=r"output\.weight; blk\.0\.attn_q"):
        write_gguf(adapter, base, tmp_path / "dora.gguf")
    assert not (tmp_path / "dora.gguf").exists()


def test_a_rank_of_one_may_stand_as_a_vector(base: Base, tmp_path: Path):
    """As ggml's own writer drops trailing dimensions of 1."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    a, b = np.arange(64, dtype=np.float32), np.ones((64, 1), np.float32)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", a)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (delta,) = lora.read(tmp_path / "one.gguf", base).deltas.values()
    assert delta.rank == 1 and delta.scale == 1.0  # no alpha: no division
    np.testing.assert_array_equal(delta.a, a[None])
