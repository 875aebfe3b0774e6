"""Folders that are broken, hostile, or say what GGUF cannot: one error that names it, and no file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import realm
from hf_folders import edit, golden
from safetensors.numpy import load_file, save_file

from realm_jax import gguf
from realm_jax.convert import agreement, hf
from realm_jax.errors import ModelFileError, RealmError, UnsupportedError

Change = Callable[[dict[str, Any]], Any]
DEEP = "[" * 100_000 + "]" * 100_000


def steps(whole: dict[str, Any]) -> list[dict[str, Any]]:
    return whole["pre_tokenizer"]["pretokenizers"]


CONFIG, TOKENIZER, BROKEN, NOT_HERE = "config.json", "tokenizer.json", ModelFileError, UnsupportedError
IN_WORDS = {"id": 325, "content": "ello", "single_word": True, "lstrip": False, "rstrip": False}
IN_WORDS |= {"normalized": False, "special": False}
# model, file, what is done to it, the error, and words of its message
CHANGES: list[tuple[str, str, Change, type[RealmError], str]] = [
    ("llama", CONFIG, lambda c: c.update(architectures=["MambaForCausalLM"]),
     NOT_HERE, "Qwen2ForCausalLM, Qwen3ForCausalLM"),
    ("llama", CONFIG, lambda c: c.update(architectures=None, model_type="mamba"), NOT_HERE, "mamba"),
    ("llama", CONFIG, lambda c: c.update(quantization_config={"quant_method": "gptq"}), NOT_HERE, "gptq"),
    ("llama", CONFIG, lambda c: c.update(num_hidden_layers=10**9), BROKEN, "num_hidden_layers"),
    ("llama", CONFIG, lambda c: c.update(num_hidden_layers=4000), BROKEN, "block_count"),
    ("llama", CONFIG, lambda c: c.update(num_hidden_layers=3),
     BROKEN, "model.layers.2.self_attn.q_proj.weight is missing"),
    ("llama", CONFIG, lambda c: c.update(num_hidden_layers=1),
     BROKEN, "model.layers.1.input_layernorm.weight is unknown"),
    ("llama", CONFIG, lambda c: c.update(hidden_size=31), BROKEN, "expected [439, 31]"),
    ("llama", CONFIG, lambda c: c.update(hidden_size=True), BROKEN, "hidden_size is True"),
    ("llama", CONFIG, lambda c: c.update(num_attention_heads=0), BROKEN, "num_attention_heads is 0"),
    ("llama", CONFIG, lambda c: c.update(num_key_value_heads=3), BROKEN, "head_count is 4"),
    ("llama", CONFIG, lambda c: c.update(rms_norm_eps=float("nan")), BROKEN, "rms_norm_eps is nan"),
    ("llama", CONFIG, lambda c: c.update(vocab_size=1 << 40), BROKEN, "vocab_size"),
    ("llama", CONFIG, lambda c: c.update(vocab_size=1 << 20), BROKEN, "has 439 rows"),
    ("llama", CONFIG, lambda c: c.update(hidden_act="relu"), NOT_HERE, "hidden_act is 'relu'"),
    ("llama", CONFIG, lambda c: c["rope_parameters"].update(rope_type="dynamic"),
     NOT_HERE, "default, linear, yarn, llama3"),
    ("llama", CONFIG, lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5),
     NOT_HERE, "partial_rotary_factor is 0.5"),
    ("llama-llama3", CONFIG, lambda c: c["rope_scaling"].update(high_freq_factor=0.5),
     BROKEN, "high_freq_factor is 0.5"),
    ("qwen2", CONFIG, lambda c: c["rope_scaling"].update(beta_fast=16), NOT_HERE, "beta_fast is 16"),
    ("qwen2", CONFIG, lambda c: c["rope_scaling"].update(rope_type="llama3"), NOT_HERE, "llama3"),
    ("phi3-longrope", CONFIG, lambda c: c["rope_scaling"].update(long_factor=[1.0] * 3),
     BROKEN, "long_factor is a list of 3; it must be 4 positive numbers"),
    ("gemma2", CONFIG, lambda c: c.update(query_pre_attn_scalar=16), NOT_HERE, "means 8"),
    ("gemma2", CONFIG, lambda c: c.update(final_logit_softcapping=None), NOT_HERE, "null"),
    ("gemma3", CONFIG, lambda c: c.update(attn_logit_softcapping=50.0), NOT_HERE, "take none"),
    ("gemma3", CONFIG, lambda c: c["layer_types"].reverse(), NOT_HERE, "windows elsewhere"),
    ("qwen3", "model.safetensors.index.json",
     lambda i: i["weight_map"].update({"x": "../../secret.safetensors"}), BROKEN, "only files beside it"),
    ("qwen3", "model.safetensors.index.json",
     lambda i: i["weight_map"].update({"x": "no.safetensors"}), BROKEN, "missing: no.safetensors"),
    ("llama", TOKENIZER, lambda t: t["model"].update(type="Unigram"), NOT_HERE, "Unigram"),
    ("llama", TOKENIZER, lambda t: t["model"]["vocab"].update(new=439), BROKEN, "439 tokens"),
    ("llama", TOKENIZER, lambda t: t["model"]["vocab"].update(new=-1), BROKEN, "'new' as -1"),
    ("llama", TOKENIZER, lambda t: t["model"]["vocab"].update(new=300), BROKEN, "300 twice"),
    ("llama", TOKENIZER, lambda t: t["model"]["merges"].pop(), NOT_HERE, "SentencePiece trained"),
    ("llama", TOKENIZER, lambda t: t["model"]["merges"].append(["a"]), BROKEN, "no pair"),
    ("llama", TOKENIZER, lambda t: t.update(normalizer={"type": "NFKC"}), NOT_HERE, "NFKC"),
    ("llama", TOKENIZER, lambda t: t["added_tokens"][0].update(id=1 << 40), BROKEN, "id is"),
    ("qwen2", TOKENIZER, lambda t: t.update(normalizer={"type": "Lowercase"}), NOT_HERE, "Lowercase"),
    ("qwen2", TOKENIZER, lambda t: steps(t)[0]["pattern"].update(Regex="(a+)+$"),
     NOT_HERE, "cuts by '(a+)+$'"),
    ("qwen2", TOKENIZER, lambda t: steps(t)[1].update(add_prefix_space=True), NOT_HERE, "a space"),
    ("qwen2", TOKENIZER, lambda t: t["model"].update(ignore_merges=True), NOT_HERE, "ignores"),
    ("qwen3", TOKENIZER, lambda t: t["added_tokens"].append(IN_WORDS),
     NOT_HERE, "state this tokenizer exactly"),
    ("qwen2", "tokenizer_config.json", lambda t: t.update(eos_token="<gone>"), BROKEN, "'<gone>'"),
    ("qwen2", "tokenizer_config.json", lambda t: t.update(chat_template="x" * (1 << 21)), BROKEN, "template"),
    ("llama", TOKENIZER, lambda t: t["model"].update(continuing_subword_prefix="too long"),
     BROKEN, "range end index"),  # a panic of the tokenizers library
    ("qwen2", "tokenizer_config.json", lambda t: t.update(chat_template="half \ud800"),
     BROKEN, r"has half of a character, \ud800"),
    ("qwen2", "generation_config.json", lambda g: g.update(eos_token_id=[1 << 40]), BROKEN, "eos_token_id"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "file", "change", "error", "words"), CHANGES)
def test_what_cannot_be_converted(
    model: str, file: str, change: Change, error: type[RealmError], words: str, tmp_path: Path
):
    folder = edit(golden(model, tmp_path), file, change)
    with pytest.raises(error) as raised:
        hf.read(folder)
    message = str(raised.value)
    assert words in message
    assert len(message) < 2000 and "\n" not in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("data", [b"", b"{", b"[1]", DEEP.encode(), b"\xff\xfe", b"\xff" * 64])
def test_files_that_are_none(file: str, data: bytes, tmp_path: Path):
    folder = golden("llama", tmp_path)
    (folder / file).write_bytes(data)
    with pytest.raises(RealmError, match=file):
        hf.read(folder)


@pytest.mark.parametrize(("vocabulary", "words"), [(1 << 24, "must be from 1 to"), (1 << 20, "1048576, 0]")])
def test_rows_that_take_no_bytes(vocabulary: int, words: str, tmp_path: Path):
    """A name for each of them would be gigabytes."""
    folder = edit(golden("qwen2", tmp_path), CONFIG, lambda c: c.update(vocab_size=vocabulary))
    values = load_file(folder / "model.safetensors")
    values["model.embed_tokens.weight"] = np.zeros((vocabulary, 0), np.float32)
    save_file(values, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=words):
        hf.read(folder)


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"])
def test_what_is_no_file_is_not_read(file: str, tmp_path: Path):
    """A pipe would wait for ever, and a device never end."""
    folder = golden("qwen2", tmp_path)
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to("/dev/zero")
    with pytest.raises(ModelFileError, match=f"{file}: is no file"):
        hf.read(folder)


def test_json_of_any_size_is_not_parsed(tmp_path: Path):
    folder = golden("qwen2", tmp_path)
    with (folder / CONFIG).open("r+b") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(ModelFileError, match="16,777,217 bytes; the limit is 16,777,216"):
        hf.read(folder)


def test_a_tokenizer_that_takes_for_ever_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = golden("qwen2", tmp_path)
    monkeypatch.setattr(agreement, "SECONDS", 0.01)
    with pytest.raises(ModelFileError, match="takes longer than"):
        hf.read(folder)


def test_a_folder_whose_name_is_no_utf_8(tmp_path: Path):
    folder = golden("qwen2", tmp_path).rename(tmp_path / os.fsdecode(b"caf\xe9"))
    hf.read(folder).write(tmp_path / "out.gguf")
    with gguf.open(tmp_path / "out.gguf") as file:
        assert file.metadata["general.name"] == "caf\ufffd"


def test_pickles_are_not_opened(tmp_path: Path):
    folder = golden("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="safe_serialization=True"):
        hf.read(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelFileError, match=r"no model\.safetensors"):
        hf.read(folder)


def test_a_tensor_that_stands_twice(tmp_path: Path):
    folder = golden("qwen3", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = sorted(set(index.values()))
    save_file(load_file(folder / second) | load_file(folder / first), folder / second)
    with pytest.raises(ModelFileError, match=f"stands in {first} too"):
        hf.read(folder)


def test_a_failed_conversion_leaves_nothing(tmp_path: Path):
    """What float16 cannot hold is found while tensors are written."""
    folder = golden("gemma2", tmp_path)
    values = load_file(folder / "model.safetensors")
    values["model.layers.1.mlp.down_proj.weight"] = np.full((32, 64), 1e6, np.float32)
    save_file(values, folder / "model.safetensors")
    done = realm("convert", "hf", folder, tmp_path / "out.gguf", "--type", "f16")
    assert "blk.1.ffn_down.weight: values up to 1e+06 are too large for F16 (take BF16 or F32)" in done.error
    assert [path.name for path in tmp_path.iterdir()] == ["gemma2"]
    assert realm("convert", "hf", folder, tmp_path / "out.gguf", "--type", "f32").code == 0
