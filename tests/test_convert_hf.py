"""A folder of Hugging Face's form becomes a GGUF file that computes what transformers computes."""

import ctypes
import importlib
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from command_line import realm
from hf_folders import GOLDEN, MODELS, TOKENIZERS, edit, expected_logits, golden
from safetensors.numpy import load_file, save_file

from realm_jax import LLM, gguf
from realm_jax.chat import ChatTemplate
from realm_jax.convert import hf, tensors
from realm_jax.ggml import GGMLType
from realm_jax.quant.int8 import quantize_q8_0
from realm_jax.quantization.file_types import file_type_of
from realm_jax.quantization.requantizing import Quantization
from realm_jax.tokenizer import Tokenizer

LONGROPE_ORIGINAL = 48
CHAT = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Nile."},
    {"role": "user", "content": "Another?"},
]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The golden model as a GGUF file; converted once."""
    root = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        path = root / f"{name}.gguf"
        if not path.exists():
            hf.read(golden(name, root)).write(path)
        return path

    return convert


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, bytes]]]:
    """Metadata but for the name, and each tensor's type, shape and bytes."""
    with gguf.open(path) as file:
        metadata = {key: repr(value) for key, value in file.metadata.items() if key != "general.name"}
        return metadata, {
            name: ((info.ggml_type, info.shape), file.data(name).tobytes())
            for name, info in file.tensors.items()
        }


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, converted: Callable[[str], Path]):
    expected = expected_logits(name)
    for prefix in ("", "short_") if "longrope" in name else ("",):
        context = LONGROPE_ORIGINAL if prefix else 128
        llm = LLM(converted(name), dtype="float32", ctx_size=context)
        logits = llm.logits(expected[f"{prefix}tokens"].tolist())
        golden_logits = expected[f"{prefix}logits"]
        assert np.abs(logits[-len(golden_logits) :] - golden_logits).max() < 1e-4


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_and_chats_are_those_of_tokenizers(name: str, tmp_path: Path):
    model = next(each for each in MODELS if name in (GOLDEN / each / "config.json").read_text())
    metadata = hf.read(golden(model, tmp_path)).metadata
    tokenizer = Tokenizer.from_metadata(metadata)
    expected = json.loads((GOLDEN / "tokenizers" / name / "expected.json").read_text())
    for text, ids in expected["texts"].items():
        assert tokenizer.encode(text, parse_special=True) == ids, text
    facts = json.loads((GOLDEN / "tokenizers" / name / "tokenizer_config.json").read_text())
    texts = {key: value for key, value in facts.items() if key.endswith("_token") and isinstance(value, str)}
    template = ChatTemplate.require(metadata, **texts)
    assert template.render(CHAT) == expected["chat"]
    assert tokenizer.encode(expected["chat"], add_special=False, parse_special=True) == expected["chat_ids"]
    assert tokenizer.eos_id == tokenizer.token_to_id(facts["eos_token"])


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_agrees(name: str, tmp_path: Path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is no dependency; with it this compares")
    from llama_peer import LlamaPeer

    api: Any = importlib.import_module("llama_cpp.llama_cpp")
    expected, path = expected_logits(name), tmp_path / "float32.gguf"  # it would round what bf16 multiplies
    hf.read(golden(name, tmp_path), GGMLType.F32).write(path)
    peer = LlamaPeer(path, sequences=1, tokens=128, threads=1, unified=True)
    # its cache is float16
    assert np.abs(peer.logits(expected["tokens"].tolist()) - expected["logits"][-1]).max() < 0.03
    vocabulary, buffer = api.llama_model_get_vocab(peer._model), (ctypes.c_int32 * 500)()
    tokenizer = json.loads((GOLDEN / name / "config.json").read_text())["tokenizer_golden"]
    texts = json.loads((GOLDEN / "tokenizers" / tokenizer / "expected.json").read_text())["texts"]
    for text, ids in texts.items():
        data = text.encode()
        count = api.llama_tokenize(vocabulary, data, len(data), buffer, len(buffer), True, True)
        assert buffer[:count] == ids, text
    peer.close()


def test_shards_and_one_file_are_the_same(converted: Callable[[str], Path], tmp_path: Path):
    folder = golden("qwen3", tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    save_file({k: v for shard in shards for k, v in load_file(shard).items()}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    hf.read(folder).write(tmp_path / "one.gguf")
    assert contents(tmp_path / "one.gguf") == contents(converted("qwen3"))


def test_both_forms_of_config_say_the_same(converted: Callable[[str], Path], tmp_path: Path):
    def as_transformers_5(config: dict[str, Any]) -> None:
        config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}

    def as_transformers_4(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope["full_attention"].pop("rope_theta")
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["rope_scaling"] = rope["full_attention"]
        del config["layer_types"], config["_sliding_window_pattern"]

    for name, rewrite in (("llama-llama3", as_transformers_5), ("gemma3", as_transformers_4)):
        folder = edit(golden(name, tmp_path), "config.json", rewrite)
        hf.read(folder).write(tmp_path / "other.gguf")
        assert contents(tmp_path / "other.gguf") == contents(converted(name))


@pytest.mark.parametrize("names", [("language_model.model.", "vision_tower."),
                                   ("model.language_model.", "model.vision_tower.")])  # fmt: skip
def test_the_language_model_within_another(
    names: tuple[str, str], converted: Callable[[str], Path], tmp_path: Path
):
    folder = golden("gemma3", tmp_path)
    values = load_file(folder / "model.safetensors")
    inner = {names[0] + key.removeprefix("model."): value for key, value in values.items()}
    save_file(
        inner | {f"{names[1]}x": np.ones((2, 3), np.int8)[:, :2].astype(np.float16)},
        folder / "model.safetensors",
    )
    config = json.loads((folder / "config.json").read_text())
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": config,
    }
    (folder / "config.json").write_text(json.dumps(whole))
    conversion = hf.read(folder)
    conversion.write(tmp_path / "other.gguf")
    assert contents(tmp_path / "other.gguf") == contents(converted("gemma3"))
    assert "1 tensors of other parts" in conversion.notes[0]


def test_types(converted: Callable[[str], Path], tmp_path: Path):
    """Unless a type is given, matrices keep theirs bit for bit; Q8_0 is that of ggml; vectors are float32."""
    folder = golden("gemma2", tmp_path)
    theirs = load_file(folder / "model.safetensors")
    embedding, norm = theirs["model.embed_tokens.weight"], theirs["model.norm.weight"]
    kept = contents(converted("gemma2"))[1]
    assert kept["token_embd.weight"][1] == embedding.tobytes()
    assert kept["output_norm.weight"][1] == (norm.astype(np.float32) + 1).tobytes()
    done = realm("convert", "hf", folder, tmp_path / "q.gguf", "--type", "Q8_0")
    assert (done.code, done.out) == (0, f"{tmp_path / 'q.gguf'}\n"), done.err
    quantized = contents(tmp_path / "q.gguf")[1]
    assert quantized["token_embd.weight"][1] == quantize_q8_0(embedding.astype(np.float32)).tobytes()
    assert quantized["blk.0.ffn_norm.weight"] == kept["blk.0.ffn_norm.weight"]


def test_a_type_is_what_quantize_makes_of_the_converted_model(tmp_path: Path):
    folder, converted = golden("qwen2", tmp_path), tmp_path / "f32.gguf"
    hf.read(folder, GGMLType.F32).write(converted)
    for kind in (GGMLType.F16, GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.MXFP4):
        made, later = tmp_path / f"{kind.name}.gguf", tmp_path / "later.gguf"
        hf.read(folder, kind).write(made)
        with gguf.open(converted) as file:
            Quantization(file, file_type_of(kind), pure=True).write(later)
        assert made.read_bytes() == later.read_bytes(), kind.name
    assert len({path.stat().st_size for path in tmp_path.glob("*.gguf")}) == 5


def test_tensors_are_written_in_pieces(
    converted: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tensors, "VALUES", 1000)  # less than two heads of a projection
    hf.read(golden("llama", tmp_path)).write(tmp_path / "pieces.gguf")
    assert contents(tmp_path / "pieces.gguf") == contents(converted("llama"))


def test_memory_is_that_of_some_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A tensor that is larger than what is expanded at a time is never in memory whole."""
    folder = golden("qwen2", tmp_path)
    monkeypatch.setattr(tensors, "VALUES", 1 << 16)
    wide = 1 << 16
    values = load_file(folder / "model.safetensors")
    for name, value in values.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            values[name] = np.zeros((wide, value.shape[1]), ml_dtypes.bfloat16)
        if name.endswith("down_proj.weight"):
            values[name] = np.zeros((value.shape[0], wide), ml_dtypes.bfloat16)
    save_file(values, folder / "model.safetensors")
    whole = max(value.size for value in values.values()) * 4
    conversion = hf.read(edit(folder, "config.json", lambda c: c.update(intermediate_size=wide)))
    tracemalloc.start()
    conversion.write(tmp_path / "out.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert whole > 4 * peak, (whole, peak)


def test_what_gguf_cannot_say_is_told(tmp_path: Path):
    folder = golden("mistral", tmp_path)
    assert hf.read(folder).notes == ()
    edit(folder, "config.json", lambda config: config.update(sliding_window=16))
    edit(folder, "tokenizer.json", lambda whole: whole["added_tokens"][1].update(rstrip=True))
    white, window = hf.read(folder).notes
    assert "white space beside <s> is kept" in white
    assert "looks back 16 tokens" in window
    shutil.copytree(golden("phi3", tmp_path), tmp_path / "other")
    conversion = hf.read(tmp_path / "other")
    assert conversion.metadata["general.name"] == "other (Phi-3)"  # so that its tokens strip white space
    assert conversion.notes == ()
