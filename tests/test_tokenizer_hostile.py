"""Bad tokenizer metadata ends in one line that names the key and its value."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import BYTE, LETTERS, byte_bpe, spm, unigram

from realm_jax import gguf
from realm_jax.errors import ModelFileError, RealmError, UnsupportedError
from realm_jax.tokenizer import Tokenizer

LONG = "x" * 5000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": 7}, "tokenizer.ggml.model is 7"),
        ({"tokens": np.arange(9, dtype=np.uint32)}, "tokenizer.ggml.tokens is an array of uint32"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": "abc"}, "tokenizer.ggml.tokens is 'abc'"),
        ({"tokens": [*LETTERS, "he", "ll", "hell", "a", "x", "y"]}, "'a' twice: ids "),
        (
            {"tokens": [*LETTERS, "he", "ll", "hell", LONG, "xx", "yy"]},
            "5,000 characters; the limit is 4,096",
        ),
        ({"tokens": [*LETTERS, "he", "ll", "hell", "\udcff", "xx", "yy"]}, "token 259, .* not UTF-8"),
        ({"token_type": np.ones(9, np.int32)}, "token_type has 9 entries; the vocabulary has 262 tokens"),
        ({"token_type": np.full(262, 7, np.int32)}, "token_type is 7 for token 0; types are 0 to 6"),
        ({"token_type": np.full(262, BYTE, np.int32)}, "token_type calls token 0 a byte"),
        ({"token_type": np.ones((2, 131), np.int32)}, "token_type is an array"),
        ({"token_type": "1"}, "token_type is '1'"),
        ({"scores": np.zeros(3, np.float32)}, "scores has 3 entries; the vocabulary has 262 tokens"),
        ({"scores": np.full(262, np.nan, np.float32)}, "scores is NaN for token 0"),
        ({"scores": ["1"] * 262}, "scores is an array of str"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["h e", "q zz"]}, "merges has entry 1, 'q zz'"),
        ({"merges": ["he"]}, "merges has entry 0, 'he'"),
        ({"merges": ["h l"]}, "merges has entry 0, 'h l'"),
        ({"merges": [3]}, "merges is an array of int"),
        ({"bos_token_id": 262}, "bos_token_id is 262; the vocabulary has 262 tokens"),
        ({"eos_token_id": -1}, "eos_token_id is -1; the vocabulary has 262 tokens"),
        ({"eot_token_id": 2**32 - 2}, "eot_token_id is 4294967294"),
        ({"eos_token_id": 2**32 - 1}, "eos_token_id is 4294967295"),
        ({"unknown_token_id": "0"}, "unknown_token_id is '0'"),
        ({"padding_token_id": True}, "padding_token_id is True"),
        ({"add_bos_token": 1}, "add_bos_token is 1; it must be true or false"),
        ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id is missing"),
        ({"pre": 3}, "tokenizer.ggml.pre is 3"),
    ],
)
def test_bad_metadata_is_named_in_one_line(changes: dict[str, Any], named: str):
    metadata = byte_bpe() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(ModelFileError, match=named) as error:
        Tokenizer.from_metadata(metadata, source="m.gguf")
    assert str(error.value).startswith("m.gguf: ") and "\n" not in str(error.value)


def test_what_is_not_supported_is_named():
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.pre is 'klingon'"):
        Tokenizer.from_metadata(byte_bpe("klingon"))
    for model in ("rwkv", "no_vocab"):
        with pytest.raises(UnsupportedError, match=f"tokenizer.ggml.model is '{model}'"):
            Tokenizer.from_metadata(byte_bpe(model=model))


@pytest.mark.parametrize("blob", [b"\1", b"\4\0\0\0", b"\xff\xff\xff\xff\0", b"\4\0\0\0\0\0\0\0x"])
def test_a_broken_character_map_is_named(blob: bytes):
    charsmap = np.frombuffer(blob, np.uint8)
    with pytest.raises(ModelFileError, match="precompiled_charsmap"):
        Tokenizer.from_metadata(unigram({"a": -1.0}, precompiled_charsmap=charsmap))


@settings(max_examples=100, deadline=None)
@given(units=st.binary(min_size=4, max_size=64), text=st.text(max_size=20))
def test_a_random_character_map_ends_in_text_or_an_error(units: bytes, text: str):
    units = units[: len(units) // 4 * 4]
    blob = len(units).to_bytes(4, "little") + units + b"ab\0"
    metadata = unigram({"a": -1.0}, precompiled_charsmap=np.frombuffer(blob, np.uint8))
    try:
        Tokenizer.from_metadata(metadata).encode(text)
    except ModelFileError as error:
        assert "precompiled_charsmap" in str(error)


WRONG = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.floats(), st.text(max_size=6), st.binary(max_size=4),
    st.lists(st.text(max_size=3), max_size=270), st.lists(st.integers(-1, 9), min_size=262, max_size=262),
    st.just(np.zeros(262, np.float32)), st.just(np.zeros((2, 2), np.int8)), st.just(np.array(3)),
)  # fmt: skip
KEYS = ["model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id",
        "unknown_token_id", "add_bos_token", "add_space_prefix", "precompiled_charsmap"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    base=st.sampled_from([byte_bpe(), spm({"a": -1.0, "aa": -2.0}), unigram({"a": -1.0})]),
    model=st.sampled_from(["llama", "gpt2", "bert", "t5", "gemma4"]),
    changes=st.dictionaries(st.sampled_from(KEYS), WRONG, max_size=3),
)
def test_random_metadata_ends_in_a_tokenizer_or_an_error(
    base: dict[str, Any], model: str, changes: dict[str, Any]
):
    metadata = base | {"tokenizer.ggml.model": model}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
        tokenizer.decode(tokenizer.encode("hello <s> wörld", parse_special=True))
    except RealmError as error:
        assert "\n" not in str(error)


def test_the_bad_file_for_tokens_fails(fixtures: Path):
    with pytest.raises(ModelFileError, match=r"tokenizer\.ggml\.tokens"):
        Tokenizer.from_gguf(fixtures / "bad" / "token-array-wrong-type.gguf")
    good = gguf.open(fixtures / "bad" / "control-good.gguf")
    assert Tokenizer.from_metadata(good.metadata).vocab_size == 16
