"""Ids are llama.cpp's; special tokens are read as it reads them; what decodes undoes what encodes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import BYTE, CONTROL, LETTERS, NORMAL, byte_bpe, opened

from realm_jax.errors import RequestError
from realm_jax.tokenizer import Tokenizer

NAMES = ["llama-spm", "llama-bpe", "qwen2", "gpt-2", "phi-3", "deepseek-coder", "starcoder", "bert-bge"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_of_the_reference_files(fixtures: Path, name: str):
    base = fixtures / "tokenizer" / f"ggml-vocab-{name}.gguf"
    texts = Path(f"{base}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")[:-1]
    lines = Path(f"{base}.out").read_text().splitlines()
    assert len(texts) == len(lines) > 40
    tokenizer = opened(fixtures, name)
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, add_special=False) == [int(token) for token in line.split()], text


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_texts_of_the_extra_file(fixtures: Path, name: str):
    tokenizer = opened(fixtures, name)
    entries = json.loads((fixtures / "tokenizer" / "expected-extra.json").read_text())[name]
    assert entries
    for entry in entries:
        text = entry["text"]
        assert tokenizer.encode(text, add_special=False) == entry["ids"], text
        assert tokenizer.encode(text, add_special=False, parse_special=True) == entry["ids_parse"], text
        assert tokenizer.encode(text) == entry["ids_special"], text
        assert tokenizer.encode(text, parse_special=True) == entry["ids_special_parse"], text
        assert tokenizer.decode(entry["ids"]) == entry["detok"], text
        assert tokenizer.decode(entry["ids_special_parse"]) == entry["detok_special_parse"], text
        assert tokenizer.decode(entry["ids_special_parse"], skip_special=True) == entry["detok_plain"], text


def test_the_default_model(fixtures: Path, default_model: Path):

    tokenizer = Tokenizer.from_gguf(default_model)
    expected = json.loads((fixtures / "smollm2" / "expected-Q4_1-dequant-f32.json").read_text())
    for prompt in expected["prompts"]:
        assert tokenizer.encode(prompt["prompt"], parse_special=True) == prompt["tokens"]
        assert tokenizer.decode(prompt["greedy"]) == prompt["greedy_text"]
    for form in ("jinja", "builtin"):
        chat = expected["chat"][form]
        assert tokenizer.encode(chat["rendered"], parse_special=True) == chat["tokens"]
        assert tokenizer.decode(chat["greedy"], skip_special=True) == chat["reply"]
        assert chat["greedy"][-1] in tokenizer.eog_ids


@pytest.mark.parametrize("name", ["qwen2", "deepseek-coder", "llama-spm"])
@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_decoding_undoes_encoding(fixtures: Path, name: str, text: str):
    text = text.replace("\u2581", "_")  # SentencePiece cannot tell it from a space
    tokenizer = opened(fixtures, name)
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


def test_control_tokens_are_read_on_demand_and_user_tokens_always():
    tokenizer = Tokenizer.from_metadata(byte_bpe(add_bos_token=True))
    text = "he<user><|im_end|>"
    plain = tokenizer.encode(text)
    assert plain[:3] == [259, 256, 261] and 260 not in plain
    assert tokenizer.encode(text, parse_special=True) == [259, 256, 261, 260]
    assert tokenizer.decode(plain, skip_special=True) == text
    assert tokenizer.decode([259, 256, 261, 260], skip_special=True) == "he<user>"
    assert (tokenizer.is_special(260), tokenizer.is_special(261)) == (True, False)
    assert tokenizer.token_to_id("<user>") == 261 and tokenizer.token_to_id("no such token") is None


def test_end_tokens_are_known_by_id_and_by_text():
    base = [*LETTERS, "he", "ll", "hell", "<s>"]

    def ends(*names: str, **changes: Any) -> set[str]:
        tokens = [*base, *names]
        types = np.array([NORMAL] * len(tokens), np.int32)
        tokenizer = Tokenizer.from_metadata(
            byte_bpe(tokens=tokens, token_type=types, **({"eos_token_id": 259} | changes))
        )
        return {tokenizer.token_text(token) for token in tokenizer.eog_ids}

    assert ends("<|eot_id|>", "<|eom_id|>", "<|other|>") == {"<s>", "<|eot_id|>", "<|eom_id|>"}
    assert ends("<turn>", eot_token_id=260) == {"<s>", "<turn>"}
    assert ends("<|return|>", "<|call|>", "<|end|>") == {"<s>", "<|return|>", "<|call|>"}
    assert ends("<|tool_response>", "</s>") == {"<s>", "<|tool_response>"}
    assert ends("<|end|>") == {"<s>", "<|end|>"}


def test_kinds_and_defaults(fixtures: Path):
    assert Tokenizer.from_metadata(byte_bpe("llama-bpe")).add_bos
    assert not Tokenizer.from_metadata(byte_bpe("qwen2")).add_bos
    assert Tokenizer.from_metadata(byte_bpe(None)).kind == "BPE (default)"
    without = byte_bpe()
    del without["tokenizer.ggml.eos_token_id"]
    assert Tokenizer.from_metadata(without).eos_id is None, "token 11 is a comma here, and ends nothing"
    bert = opened(fixtures, "bert-bge")
    assert (bert.kind, bert.add_bos, bert.bos_id, bert.pad_id) == ("WordPiece", True, 101, 0)
    llama = opened(fixtures, "llama-spm")
    assert (llama.kind, llama.vocab_size, llama.bos_id, llama.eos_id) == ("SPM", 32000, 1, 2)
    assert llama.token_bytes(3 + 0xE2) == b"\xe2" and llama.token_bytes(3186) == b" world"


def test_gemma4_reads_newlines_whole_and_bytes_by_name():
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a", "\n", "\n\n", "<bos>"]
    types = np.array([BYTE] * 256 + [NORMAL] * 5 + [CONTROL], np.int32)
    tokenizer = Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gemma4",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": ["\u2581 a"],
            "tokenizer.ggml.bos_token_id": 261,
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    assert tokenizer.encode("a a\n\né") == [261, 257, 258, 260, 0xC3, 0xA9]
    assert tokenizer.decode([257, 258, 260, 0xC3, 0xA9]) == "a a\n\né"


def test_what_cannot_be_encoded_or_decoded_is_named(fixtures: Path):
    tokenizer = Tokenizer.from_metadata(byte_bpe())
    with pytest.raises(RequestError, match=r"U\+D800 at 2"):
        tokenizer.encode("ab\ud800")
    for token in (-1, 262):
        with pytest.raises(RequestError, match=f"token id is {token}; the vocabulary has 262 tokens"):
            tokenizer.decode([token])
