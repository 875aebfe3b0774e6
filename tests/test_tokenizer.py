"""Ids are llama.cpp's; decoding undoes encoding; a stream is the whole, in parts; bad metadata is named."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from realm_jax import gguf
from realm_jax.errors import ModelFileError, RealmError, RequestError, UnsupportedError
from realm_jax.tokenizer import TextStream, Tokenizer
from realm_jax.tokenizer.pretokenizers import PRETOKENIZERS
from realm_jax.tokenizer.tokenizer import _BYTE_OF_LETTER

NAMES = ["llama-spm", "llama-bpe", "qwen2", "gpt-2", "phi-3", "deepseek-coder", "starcoder", "bert-bge"]
LETTERS = list(_BYTE_OF_LETTER)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
_opened: dict[str, Tokenizer] = {}


def opened(fixtures: Path, name: str) -> Tokenizer:
    if name not in _opened:
        _opened[name] = Tokenizer.from_gguf(fixtures / "tokenizer" / f"ggml-vocab-{name}.gguf")
    return _opened[name]


def byte_bpe(pre: Any = "smollm", **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE whose tokens are the 256 letters, 'he', 'll', 'hell' and three more."""
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*LETTERS, "he", "ll", "hell", "<s>", "<|im_end|>", "<user>"],
        "tokenizer.ggml.token_type": np.array([NORMAL] * 259 + [CONTROL, CONTROL, USER_DEFINED], np.int32),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 259,
        "tokenizer.ggml.eos_token_id": 260,
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def spm(pieces: dict[str, float], **changes: Any) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array(
            [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces), np.int32
        ),
    }
    return metadata | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


# The ids of llama.cpp


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


def test_the_default_model(fixtures: Path):
    from realm_jax import hub

    path = hub.cached_path()
    if path is None:
        pytest.skip("the default model is not in the cache (realm models pull)")
    tokenizer = Tokenizer.from_gguf(path)
    expected = json.loads((fixtures / "smollm2" / "expected-Q4_1-dequant-f32.json").read_text())
    for prompt in expected["prompts"]:
        assert tokenizer.encode(prompt["prompt"], parse_special=True) == prompt["tokens"]
        assert tokenizer.decode(prompt["greedy"]) == prompt["greedy_text"]
    for form in ("jinja", "builtin"):
        chat = expected["chat"][form]
        assert tokenizer.encode(chat["rendered"], parse_special=True) == chat["tokens"]
        assert tokenizer.decode(chat["greedy"], skip_special=True) == chat["reply"]
        assert chat["greedy"][-1] in tokenizer.eog_ids


# Laws of encoding


@pytest.mark.parametrize("name", ["qwen2", "deepseek-coder", "llama-spm"])
@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_decoding_undoes_encoding(fixtures: Path, name: str, text: str):
    text = text.replace("\u2581", "_")  # SentencePiece cannot tell it from a space
    tokenizer = opened(fixtures, name)
    assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_every_pretokenizer_keeps_the_text(pre: str):
    changes: dict[str, Any] = {}
    if PRETOKENIZERS[pre].spaces_as_symbol:
        tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        changes = {
            "tokens": [*tokens, "\u2581", "h", "e", "l", "he", "ll", "hell", "<s>", "<|im_end|>"],
            "token_type": np.array([BYTE] * 256 + [NORMAL] * 7 + [CONTROL] * 2, np.int32),
            "bos_token_id": 263,
            "eos_token_id": 264,
        }
    tokenizer = Tokenizer.from_metadata(byte_bpe(pre, **changes))
    text = "Hello, world's  end\r\n\n\t x²  12345 ÀÉÎ été हिन्दी 你好,世界 한국어 😀\u200b\u3000<a/b> !?\n  "
    tokens = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, add_special=False)))
    assert tokens.decode() == text


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "we'll  be 12345!", ["we", "'ll", " ", " be", " 12345", "!"]),
        ("smollm", "in 2024", ["in", " ", "2", "0", "2", "4"]),
        ("llama-bpe", "I'M 12345 (x)\n\n", ["I", "'M", " ", "123", "45", " (", "x", ")\n\n"]),
        ("qwen2", "a 12\n b", ["a", " ", "1", "2", "\n", " b"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("gpt-4o", "camelCase HTMLParser's a/b/", ["camel", "Case", " HTMLParser's", " a", "/b", "/"]),
        ("tekken", "camelCase 12", ["camel", "Case", " ", "1", "2"]),
        ("deepseek-v3", "x12345,ok 你好 a", ["x", "123", "45", ",ok", " ", "你好", " a"]),
        ("deepseek-llm", "Σa 你b\n 7", ["Σ", "a", " ", "你", "b", "\n", " ", "7"]),
        ("falcon", "a=1234", ["a", "=", "123", "4"]),
        ("bloom", "one, two", ["one", ",", " two"]),
        ("superbpe", "to be 1234567", ["to be ", "1", "234", "567"]),
        ("afmoe", "x 12345", ["x", " ", "12", "345"]),
        ("tiny_aya", "12345 AbC", ["12", "345", " AbC"]),
        ("gemma4", "a b\n\nc", ["a b", "\n\n", "c"]),
        ("chameleon", "a  7", ["a", "  ", "7"]),
    ],
)
def test_words_of_pretokenizers(pre: str, text: str, words: list[str]):
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in PRETOKENIZERS[pre].splits
    ]
    assert [word for word, _ in pre_tokenizers.Sequence(list(splits)).pre_tokenize_str(text)] == words


def merged_one_by_one(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE by its definition: merge the best pair, leftmost first, until there is none."""
    symbols = list(text)
    while True:
        sums = [a + b for a, b in pairwise(symbols)]
        best = max(((scores[s], -i) for i, s in enumerate(sums) if s in scores), default=None)
        if best is None:
            return symbols
        at = -best[1]
        symbols[at : at + 2] = [sums[at]]


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.dictionaries(
        st.text("ab\u2581c", min_size=1, max_size=5), st.sampled_from([-3.0, -2.0, -1.0, 0.0]), max_size=12
    ),
    text=st.text("ab cd", max_size=90),
)
def test_merging_by_score_is_its_definition(pieces: dict[str, float], text: str):
    tokenizer = Tokenizer.from_metadata(spm(pieces, add_space_prefix=False))
    expected = [
        token
        for symbol in merged_one_by_one(text.replace(" ", "\u2581"), pieces)
        for token in ([symbol] if symbol in pieces else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]
    assert [*map(tokenizer.token_text, tokenizer.encode(text, add_special=False))] == expected


def test_a_word_that_is_a_token_is_not_merged_where_the_model_says_so():
    metadata = byte_bpe("llama-bpe", merges=["l l"])
    assert Tokenizer.from_metadata(metadata).encode("hell", add_special=False) == [258]
    metadata["tokenizer.ggml.pre"] = "qwen2"
    assert Tokenizer.from_metadata(metadata).encode("hell", add_special=False)[-1] == 257


def best_segmentation(text: str, scores: dict[str, float]) -> float:
    best = [0.0] + [-np.inf] * len(text)
    for end in range(1, len(text) + 1):
        best[end] = max(best[start] + scores.get(text[start:end], -np.inf) for start in range(end))
    return best[-1]


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.dictionaries(st.text("ab", min_size=2, max_size=4), st.floats(-9, -1, width=32), max_size=8),
    text=st.text("ab", min_size=1, max_size=20),
)
def test_unigram_takes_the_best_segmentation(pieces: dict[str, float], text: str):
    pieces = {"a": -5.0, "b": -6.0} | pieces
    tokenizer = Tokenizer.from_metadata(unigram(pieces))
    got = [tokenizer.token_text(token) for token in tokenizer.encode(text, add_special=False)]
    assert "".join(got) == text
    assert sum(pieces[piece] for piece in got) == pytest.approx(best_segmentation(text, pieces))


def unigram(pieces: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": ["<pad>", "</s>", "<unk>", *pieces],
        "tokenizer.ggml.scores": np.array([0.0, 0.0, 0.0, *pieces.values()], np.float32),
        "tokenizer.ggml.token_type": np.array([CONTROL, CONTROL, UNKNOWN] + [NORMAL] * len(pieces), np.int32),
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def character_map(replacements: dict[int, bytes]) -> np.ndarray:
    """SentencePiece's map for single bytes: the root's children at 256, their replacements at 512."""
    units, texts = np.zeros(1024, "<u4"), b""
    units[0] = 256 << 10
    for byte, text in replacements.items():
        units[256 ^ byte] = byte | 1 << 8 | (256 ^ 512) << 10
        units[512 ^ byte] = 1 << 31 | len(texts)
        texts += text + b"\0"
    blob = (4 * len(units)).to_bytes(4, "little") + units.tobytes() + texts
    return np.frombuffer(blob, np.uint8)


def test_unigram_normalizes_and_marks_spaces():
    charsmap = character_map({ord("A"): b"a", ord("\t"): b" ", ord("Z"): b""})
    pieces = {"a": -1.0, "\u2581": -1.0, "\u2581a": -1.5}
    encode = {
        merge: Tokenizer.from_metadata(
            unigram(
                pieces, precompiled_charsmap=charsmap, remove_extra_whitespaces=merge, add_space_prefix=True
            )
        )
        for merge in (False, True)
    }

    def texts(merge: bool, text: str) -> list[str]:
        return [encode[merge].token_text(token) for token in encode[merge].encode(text)]

    assert texts(False, "AaZ\ta") == ["\u2581a", "a", "\u2581a", "</s>"]
    assert texts(True, " A \t a é") == ["\u2581a", "\u2581a", "\u2581", "<unk>", "</s>"]
    assert texts(False, "  a") == ["\u2581", "\u2581", "\u2581a", "</s>"]
    assert texts(False, "\uffff0") == ["\u2581", "<unk>", "</s>"]


# Special tokens


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


# Streams

STREAMED = ["llama-spm", "gpt-2", "llama-bpe"]  # byte tokens; cleaned spaces


def cut(text: str, stop: list[str]) -> str:
    """The text before the stop string that ends first, and of these the longest."""
    met = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    return text[: min(met)[1]] if met else text


@pytest.mark.parametrize("name", STREAMED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_joined_are_the_whole(fixtures: Path, name: str, data: st.DataObject):
    tokenizer = opened(fixtures, name)
    some = st.integers(0, 600) | st.integers(0, tokenizer.vocab_size - 1)
    texts = st.text(" '.?!,smrvet\n", max_size=12) | st.text(max_size=8)
    parts = data.draw(st.lists(st.lists(some, max_size=6) | texts, max_size=8))
    ids = [i for part in parts for i in (tokenizer.encode(part, False) if isinstance(part, str) else part)]
    skip, continues = data.draw(st.booleans()), data.draw(st.booleans())
    whole = tokenizer.decode(ids, skip, continues=continues)
    pieces = st.integers(0, len(whole)).flatmap(
        lambda start: st.integers(1, 9).map(lambda size: whole[start : start + size])
    )
    stop = [piece for piece in data.draw(st.lists(pieces | st.just("zz"), max_size=3)) if piece]

    stream = TextStream(tokenizer, stop, skip, continues=continues)
    deltas = []
    for token in ids:
        deltas.append(stream.push(token))
        shown = "".join(deltas)
        assert cut(whole, stop).startswith(shown) and stream.text == shown
    deltas.append(stream.finish())
    assert "".join(deltas) == stream.text == cut(whole, stop)
    assert (stream.stopped is not None) == any(s in whole for s in stop)
    assert stream.finish() == "" and (stream.stopped is None or stream.push(ids[0]) == "")


def test_a_character_and_a_stop_string_are_shown_whole_or_not_at_all(fixtures: Path):
    tokenizer = opened(fixtures, "llama-spm")
    stream = TextStream(tokenizer, stop=["END"])
    assert [stream.push(3 + byte) for byte in "é".encode()] == ["", "é"]
    assert [stream.push(3 + byte) for byte in b"xENxEND"] == ["x", "", "", "ENx", "", "", ""]
    assert (stream.stopped, stream.text, stream.finish()) == ("END", "éxENx", "")
    with pytest.raises(RequestError, match="empty"):
        TextStream(tokenizer, stop=[""])


def test_a_text_that_continues_keeps_its_first_space(fixtures: Path):
    tokenizer = opened(fixtures, "llama-spm")
    ids = tokenizer.encode("Paris", add_special=False)
    assert tokenizer.decode(ids) == "Paris" and tokenizer.decode(ids, continues=True) == " Paris"


# Hostile metadata

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
        ({"eot_token_id": 2**32 - 1}, "eot_token_id is 4294967295"),
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
