"""PEFT's adapters on GGUF bases: each change is what Hugging Face's model would get, rows put in order."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from peft_files import ROOT, base_of, change, hf_rows, pair, product, write_adapter
from safetensors.numpy import load_file
from tiny import write_model

from realm_jax import lora
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora import Base
from realm_jax.lora.export import write_peft
from realm_jax.lora.fold import fold

LAYER = "model.layers.0."
Q, K, V, QKV = (f"{LAYER}self_attn.{name}_proj" for name in ("q", "k", "v", "qkv"))
GATE, UP, GATE_UP, DOWN = (f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "gate_up", "down"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A llama: 4 heads and 2 key heads of 16, width 64, 96 in the feed-forward layers."""
    return base_of(write_model(tmp_path_factory.mktemp("lora") / "tiny.gguf"))


@pytest.fixture(scope="module")
def phi3(fixtures: Path) -> Base:
    return base_of(fixtures / "arch" / "phi3" / "model.gguf")


@pytest.fixture(scope="module")
def gemma3(fixtures: Path) -> Base:
    return base_of(fixtures / "arch" / "gemma3" / "model.gguf")


def test_rows_of_q_and_k_are_put_in_pairs(base: Base, tmp_path: Path):
    tensors = pair(Q, 64, 64) | pair(K, 32, 64) | pair(V, 32, 64)
    adapter = lora.read(write_adapter(tmp_path, tensors), base)
    for module, name, heads in ((Q, "attn_q", 4), (K, "attn_k", 2)):
        found = change(adapter, f"blk.0.{name}.weight", base)
        np.testing.assert_allclose(found[hf_rows(len(found), heads)], product(tensors, module), atol=1e-4)
    np.testing.assert_allclose(change(adapter, "blk.0.attn_v.weight", base), product(tensors, V), atol=1e-4)


def test_a_fused_module_is_split_for_a_base_in_parts(base: Base, tmp_path: Path):
    tensors = pair(QKV, 128, 64) | pair(GATE_UP, 192, 64)
    adapter = lora.read(write_adapter(tmp_path, tensors), base)
    whole = product(tensors, QKV)
    q, k, v = (change(adapter, f"blk.0.attn_{name}.weight", base) for name in "qkv")
    found = np.concatenate([q[hf_rows(64, 4)], k[hf_rows(32, 2)], v])
    np.testing.assert_allclose(found, whole, atol=1e-4)
    gate, up = (change(adapter, f"blk.0.ffn_{name}.weight", base) for name in ("gate", "up"))
    np.testing.assert_allclose(np.concatenate([gate, up]), product(tensors, GATE_UP), atol=1e-4)
    assert {delta.rank for delta in adapter.deltas.values()} == {4}


@pytest.mark.parametrize("present", [(Q,), (Q, V), (K, V), (Q, K, V)])
def test_modules_in_parts_become_blocks_of_a_fused_base(phi3: Base, tmp_path: Path, present: tuple[str, ...]):
    rows = {Q: 64, K: 32, V: 32}
    tensors = {k: v for i, m in enumerate(present) for k, v in pair(m, rows[m], 64, rank=4 + i).items()}
    config = {"rank_pattern": {m: 4 + i for i, m in enumerate(present)}, "alpha_pattern": {V: 3}}
    adapter = lora.read(write_adapter(tmp_path, tensors | pair(UP, 96, 64), **config), phi3)

    def part(module: str) -> np.ndarray:
        if module not in present:
            return np.zeros((rows[module], 64))
        return product(tensors, module, (3 if module == V else 8) / (4 + present.index(module)))

    found = change(adapter, "blk.0.attn_qkv.weight", phi3)
    np.testing.assert_allclose(found, np.concatenate([part(m) for m in rows]), atol=1e-4)
    assert adapter.deltas["blk.0.attn_qkv.weight"].rank == sum(4 + i for i in range(len(present)))
    assert not change(adapter, "blk.0.ffn_up.weight", phi3)[:96].any()


def test_part_of_a_fused_tensor_cannot_have_lengths_of_its_own(phi3: Base, tmp_path: Path):
    lengths = {Q: 64, K: 32, V: 32}
    dora = {f"{m}.lora_magnitude_vector": np.full(n, n, np.float32) for m, n in lengths.items()}
    tensors = {k: v for m, n in lengths.items() for k, v in pair(m, n, 64).items()} | dora
    adapter = lora.read(write_adapter(tmp_path / "all", tensors, use_dora=True), phi3)
    assert set(adapter.magnitudes["blk.0.attn_qkv.weight"]) == {64, 32}
    fewer = {name: values for name, values in tensors.items() if V not in name}
    with pytest.raises(UnsupportedError, match=r"rows than all of blk\.0\.attn_qkv\.weight"):
        lora.read(write_adapter(tmp_path / "some", fewer, use_dora=True), phi3)


def test_an_embedding_and_a_head(base: Base, tmp_path: Path):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 320), np.float32), rng.standard_normal((64, 4), np.float32)
    names = ("model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B")
    copy = {"model.embed_tokens.base_layer.weight": np.zeros((320, 64), np.float32)}
    tensors = dict(zip(names, (a, b), strict=True)) | pair("lm_head", 320, 64)
    adapter = lora.read(write_adapter(tmp_path, tensors | copy), base)
    np.testing.assert_allclose(change(adapter, "token_embd.weight", base), 2 * (b @ a).T, atol=1e-4)
    np.testing.assert_allclose(change(adapter, "output.weight", base), product(tensors, "lm_head"), atol=1e-4)
    assert not adapter.replaced


def test_dora_is_that_of_hugging_faces_rows(base: Base, tmp_path: Path):
    rng = np.random.default_rng(0)
    lengths = rng.uniform(1, 2, 64).astype(np.float32)
    tensors = pair(Q, 64, 64) | {f"{Q}.lora_magnitude_vector": lengths}
    adapter = lora.read(write_adapter(tmp_path, tensors, use_dora=True), base)
    weight = rng.standard_normal((64, 64), np.float32)  # as the file has it
    order = hf_rows(64, 4)
    moved = weight[order] + product(tensors, Q)
    wanted = lengths[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    found = fold(weight, "blk.0.attn_q.weight", [(adapter, 1.0)], 0)
    np.testing.assert_allclose(found[order], wanted, atol=1e-5)


def test_biases_and_whole_modules(fixtures: Path, tmp_path: Path):
    base = base_of(fixtures / "arch" / "llama-bias" / "model.gguf")
    rows, kv = base.shapes["blk.0.attn_q.bias"][0], base.config.num_kv_heads
    bias = np.arange(rows, dtype=np.float32)
    head = np.ones(base.shapes["output.weight"], np.float32)
    tensors = pair(V, *base.shapes["blk.0.attn_v.weight"])
    tensors |= {f"{Q}.bias": bias, "lm_head.modules_to_save.weight": head}
    adapter = lora.read(write_adapter(tmp_path, tensors, bias="all", modules_to_save=["lm_head"]), base)
    order = hf_rows(rows, base.config.num_heads)
    np.testing.assert_array_equal(adapter.replaced["blk.0.attn_q.bias"][order], bias)
    np.testing.assert_array_equal(adapter.replaced["output.weight"], head)
    assert kv and len(adapter.replaced) == 2


def test_norms_of_gemma_are_stored_with_one_added(gemma3: Base, tmp_path: Path):
    weight = np.linspace(-0.5, 0.5, 64, dtype=np.float32)
    tensors = {f"{LAYER}post_attention_layernorm.weight": weight}
    tensors |= {f"model.layers.{i}.post_attention_layernorm.weight": weight for i in range(7)}
    saved = write_adapter(
        tmp_path, tensors | pair(DOWN, 64, 64), modules_to_save=["post_attention_layernorm"]
    )
    adapter = lora.read(saved, gemma3)
    assert len(adapter.replaced) == 7
    np.testing.assert_array_equal(adapter.replaced["blk.0.post_attention_norm.weight"], weight + 1)
    write_peft(adapter, gemma3, tmp_path / "back")
    again = load_file(tmp_path / "back" / "adapter_model.safetensors")
    name = f"{ROOT}{LAYER}post_attention_layernorm.weight"
    np.testing.assert_allclose(again[name], weight, atol=1e-7)


def test_values_of_sixteen_bits(base: Base, tmp_path: Path):
    tensors = pair(Q, 64, 64)
    for number, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        rounded = {name: values.astype(dtype) for name, values in tensors.items()}
        adapter = lora.read(write_adapter(tmp_path / str(number), rounded), base)
        wanted = product(rounded, Q)[np.argsort(hf_rows(64, 4))]
        np.testing.assert_allclose(change(adapter, "blk.0.attn_q.weight", base), wanted, atol=1e-4)


def test_text_models_inside_others_have_a_prefix(gemma3: Base, tmp_path: Path):
    for number, prefix in enumerate(("model.language_model.", "language_model.model.")):
        tensors = pair(DOWN.replace("model.", prefix), 64, 64)
        config = {"target_modules": r".*language_model.*layers\.0\.mlp\.(down)_proj"}
        adapter = lora.read(write_adapter(tmp_path / str(number), tensors, **config), gemma3)
        assert list(adapter.deltas) == ["blk.0.ffn_down.weight"]


def test_rank_stabilized_scales(base: Base, tmp_path: Path):
    tensors = pair(Q, 64, 64) | pair(V, 32, 64, rank=9)
    config = {"use_rslora": True, "rank_pattern": {r"layers\.\d+\.self_attn\.v_proj": 9}}
    adapter = lora.read(write_adapter(tmp_path, tensors, **config), base)
    assert adapter.deltas["blk.0.attn_q.weight"].scale == 8 / 4**0.5
    assert adapter.deltas["blk.0.attn_v.weight"].scale == pytest.approx(8 / 3)


def test_the_first_pattern_that_matches_counts(base: Base, tmp_path: Path):
    alphas = {
        "0.self_attn.q_proj": 1,
        "q_proj": 2,
        "^model.layers.0.self_attn.v_proj": 3,
        "proj": 4,
        "o_proj": 5,
    }
    tensors = {k: v for m in (Q, V, DOWN) for k, v in pair(m, *((64, 96) if m == DOWN else (64, 64))).items()}
    tensors |= pair(V, 32, 64) | pair(f"{LAYER}self_attn.o_proj", 64, 64)
    adapter = lora.read(write_adapter(tmp_path, tensors, alpha_pattern=alphas), base)
    scales = {name.split(".")[2]: 4 * delta.scale for name, delta in adapter.deltas.items()}
    assert scales == {"attn_q": 1, "attn_v": 3, "ffn_down": 8, "attn_output": 5}


def both_layers(*parts: str) -> dict[str, np.ndarray]:
    rows = {"q": 64, "k": 32, "v": 32, "o": 64}
    names = [(f"model.layers.{i}.self_attn.{part}_proj", rows[part]) for i in (0, 1) for part in parts]
    return {k: v for name, outputs in names for k, v in pair(name, outputs, 64).items()}


@pytest.mark.parametrize(
    ("targets", "parts", "more"),
    [
        (["q_proj", "v_proj"], "qv", {}),
        (["q_proj", "c_attn"], "q", {}),  # names of other models do no harm, as in PEFT
        ("q_proj", "", {}),  # an expression has to match all of a name
        (r".*\.(q|o)_proj", "qo", {}),
        (r"(?!.*k_proj).*self_attn\..*", "qvo", {}),
        (["self_attn.q_proj"], "q", {"layers_to_transform": None}),
        (["q_proj", "k_proj"], "q", {"exclude_modules": r".*k_proj"}),
    ],
)
def test_the_configuration_names_what_the_file_has(
    base: Base, tmp_path: Path, targets: object, parts: str, more: dict[str, object]
):
    tensors = both_layers(*parts) | both_layers("q")
    folder = write_adapter(tmp_path, tensors, target_modules=targets, **more)
    if parts:
        assert len(lora.read(folder, base).deltas) == 2 * len(parts)
        return
    with pytest.raises(
        ModelFileError, match=r"layers\.0\.self_attn\.q_proj has tensors, but is not in target"
    ):
        lora.read(folder, base)


def test_all_linear_is_every_projection_but_the_head(base: Base, tmp_path: Path):
    tensors = both_layers("q", "k", "v", "o")
    for i in (0, 1):
        for part, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
            tensors |= pair(f"model.layers.{i}.mlp.{part}_proj", *shape)
    assert len(lora.read(write_adapter(tmp_path, tensors, target_modules="all-linear"), base).deltas) == 14
    fewer = {name: values for name, values in tensors.items() if "1.mlp.up" not in name}
    with pytest.raises(ModelFileError, match=r"model\.layers\.1\.mlp\.up_proj has no tensors"):
        lora.read(write_adapter(tmp_path, fewer, target_modules="all-linear"), base)


def test_only_some_layers(base: Base, tmp_path: Path):
    tensors = pair(Q.replace(".0.", ".1."), 64, 64)
    config = {"target_modules": ["q_proj"], "layers_to_transform": [1]}
    assert list(lora.read(write_adapter(tmp_path, tensors, **config), base).deltas) == ["blk.1.attn_q.weight"]
    with pytest.raises(ModelFileError, match=r"layers\.0\.self_attn\.q_proj has no tensors"):
        lora.read(write_adapter(tmp_path, tensors, target_modules=["q_proj"]), base)


def test_a_tied_embedding_cannot_part_from_its_head(fixtures: Path, tmp_path: Path):
    base = base_of(fixtures / "arch" / "llama-gqa-tied" / "model.gguf")
    embedding = {"model.embed_tokens.lora_embedding_A": np.ones((4, 320), np.float32)}
    embedding |= {"model.embed_tokens.lora_embedding_B": np.ones((64, 4), np.float32)}
    with pytest.raises(UnsupportedError, match="embedding and output head are one tensor"):
        lora.read(write_adapter(tmp_path / "1", embedding), base)
    with pytest.raises(
        ModelFileError, match=r"lm_head: the model has no output\.weight, as its head is tied"
    ):
        lora.read(write_adapter(tmp_path / "2", pair("lm_head", 320, 64)), base)
    ones = np.ones((320, 64), np.float32)
    whole = {"model.embed_tokens.weight": ones, "lm_head.weight": ones}
    config = {"modules_to_save": ["embed_tokens", "lm_head"], "target_modules": []}
    assert list(lora.read(write_adapter(tmp_path / "3", whole, **config), base).replaced) == [
        "token_embd.weight"
    ]
    with pytest.raises(UnsupportedError, match="an embedding and an output head that differ"):
        lora.read(write_adapter(tmp_path / "4", whole | {"lm_head.weight": 2 * ones}, **config), base)
