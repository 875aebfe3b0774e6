"""BPE as SentencePiece has it: GGUF states it by scores of tokens, which follow from the order of merges."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from realm_jax.convert.fields import Fields
from realm_jax.convert.vocabularies import HFVocabulary, merges_of
from realm_jax.errors import UnsupportedError
from realm_jax.lora.fitting import shown
from realm_jax.tokenizer.vocabulary import SPACE, TokenType, byte_of

LEAST = -1e6  # below every token that merges make


def is_one(whole: Fields) -> bool:
    """Whether characters are merged, and those without a token become bytes."""
    model = whole.section("model")
    return model is not None and model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def keys(whole: Fields, config: Fields, vocabulary: HFVocabulary) -> tuple[dict[str, Any], list[str]]:
    """GGUF's keys, and notes. Raises UnsupportedError for what scores cannot say."""
    model = whole.section("model")
    assert model is not None
    prefix = _prefix(whole)
    notes = []
    if prefix == "first":
        notes.append(
            "text behind a special token is read with a space before it, which this tokenizer adds at the "
            "start only: GGUF cannot say so"
        )
    found = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(merges_of(model, vocabulary), vocabulary),
        "tokenizer.ggml.add_space_prefix": prefix != "never",
    }
    return found, notes


def types(whole: Fields, vocabulary: HFVocabulary) -> Iterator[int]:
    """The kind of each token."""
    model = whole.section("model")
    unknown = model.get("unk_token") if model else None
    for number in range(vocabulary.size):
        text = vocabulary.by_id.get(number)
        if text is None:
            yield TokenType.UNUSED
        elif text == unknown:
            yield TokenType.UNKNOWN
        elif number in vocabulary.added:
            yield vocabulary.added[number].type
        else:
            yield TokenType.BYTE if byte_of(text) is not None else TokenType.NORMAL


def _prefix(whole: Fields) -> str:
    """Where a space is put before text: always, first or never."""
    normalizer, pre = whole.section("normalizer"), whole.section("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.objects("normalizers") or [normalizer]
    steps = [step for step in steps if step.get("type") != "Sequence"]
    kinds = [str(step.get("type")) for step in steps]
    written = [step.get("content") for step in steps if step.get("type") == "Replace"]
    cut = None if pre is None else pre.get("type")
    if kinds == ["Prepend", "Replace"] and written == [SPACE] and cut is None:
        return "always"
    if kinds == ["Replace"] and written == [SPACE] and cut in (None, "Split"):
        return "never"
    if not kinds and pre is not None and cut == "Metaspace" and pre.get("replacement") == SPACE:
        scheme = pre.text("prepend_scheme", "always" if pre.flag("add_prefix_space", True) else "never")
        if scheme in ("always", "first", "never"):
            return scheme
    raise UnsupportedError(
        f"tokenizer.json: normalizer is {shown(' then '.join(kinds) or 'absent')} and pre_tokenizer "
        f"{shown(str(cut))}; converted with byte_fallback are those of Llama 2, Mistral, Phi-3 and Gemma: "
        "Prepend then Replace, Replace, or Metaspace"
    )


def _scores(merges: list[tuple[str, str]], vocabulary: HFVocabulary) -> np.ndarray:
    """Minus the rank of each token among those that merges make, which all its splits share."""
    ranks: dict[str, int] = {}
    ways: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
        ways[left + right] = ways.get(left + right, 0) + 1
    ids, added = vocabulary.ids, {each.text for each in vocabulary.added.values()}
    for text in ids:
        if text in added or byte_of(text) is not None or len(text) > 64:
            continue
        splits = sum(text[:cut] in ids and text[cut:] in ids for cut in range(1, len(text)))
        if splits != ways.get(text, 0):
            raise UnsupportedError(
                f"tokenizer.json: {shown(text)!r} splits into two tokens in {splits} ways, of which "
                f"{ways.get(text, 0)} are merges; scores say that all are (converted are tokenizers that "
                "SentencePiece trained)"
            )
    scores = np.zeros(vocabulary.size, np.float32)
    for text, number in ids.items():
        if text in ranks:
            scores[number] = -ranks[text]
        elif text not in added and byte_of(text) is None:
            scores[number] = LEAST
    return scores
