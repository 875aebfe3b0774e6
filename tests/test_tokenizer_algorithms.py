"""Each algorithm against its definition, on small vocabularies."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from vocabularies import BYTE, CONTROL, NORMAL, byte_bpe, character_map, spm, unigram

from realm_jax.tokenizer import Tokenizer
from realm_jax.tokenizer.pretokenizers import PRETOKENIZERS


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
