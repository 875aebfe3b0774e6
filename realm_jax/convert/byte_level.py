"""Byte-level BPE: merges as they are, and the name that GGUF has for the way in which text is cut into words.

llama.cpp's converter knows tokenizers by a checksum of what they make of a text, so it knows published ones
only. Here the expressions themselves are compared with those that the names stand for.
"""

from collections.abc import Iterator
from typing import Any

from realm_jax.convert.fields import Fields
from realm_jax.convert.vocabularies import HFVocabulary, merges_of
from realm_jax.errors import UnsupportedError
from realm_jax.lora.fitting import shown
from realm_jax.tokenizer.pretokenizers import PRETOKENIZERS
from realm_jax.tokenizer.vocabulary import TokenType

# The name that published models have, where several mean the same.
USUAL = (
    "llama-bpe",
    "dbrx",
    "qwen2",
    "gpt-2",
    "smollm",
    "starcoder",
    "stablelm2",
    "gpt-4o",
    "tekken",
    "falcon",
)
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}%s|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS}%s"
# Expressions of published models that readers of GGUF state in other words.
_OPTIONAL = _CONTRACTION + "?"
IN_OTHER_WORDS = {
    _CASED % ("*", "+", "", "+", "*", "") + r"|\p{N}" + _REST: "tekken",
    _CASED % ("*", "+", _OPTIONAL, "+", "*", _OPTIONAL) + r"|\p{N}{1,3}" + _REST: "gpt-4o",
}
_GPT2 = PRETOKENIZERS["gpt-2"].splits[0]
_NUMBER = r"\p{N}"
CONTRACTION_READ = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"


def is_one(whole: Fields) -> bool:
    """Whether letters that stand for bytes are merged."""
    model = whole.section("model")
    return model is not None and model.get("type") == "BPE" and any(
        step.get("type") == "ByteLevel" for step in _steps(whole)
    )  # fmt: skip


def keys(whole: Fields, config: Fields, vocabulary: HFVocabulary) -> tuple[dict[str, Any], list[str]]:
    """GGUF's keys, and notes. Raises UnsupportedError for a way of cutting that has no name."""
    model = whole.section("model")
    assert model is not None
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "byte_fallback"):
        if model.get(key):
            raise UnsupportedError(
                f"tokenizer.json: model.{key} is set; GGUF cannot say that of byte-level BPE"
            )
    normalizer = whole.section("normalizer")
    if normalizer is not None and not _changes_little(normalizer):
        raise UnsupportedError(
            f"tokenizer.json: normalizer is {shown(str(normalizer.get('type')))}; converted are none and NFC"
        )
    merges = [" ".join(pair) for pair in merges_of(model, vocabulary)]
    pre = _name(whole, config, model.flag("ignore_merges", False))
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}, []


def types(whole: Fields, vocabulary: HFVocabulary) -> Iterator[int]:
    """The kind of each token."""
    for number in range(vocabulary.size):
        if number in vocabulary.added:
            yield vocabulary.added[number].type
        else:
            yield TokenType.NORMAL if number in vocabulary.by_id else TokenType.UNUSED


def _changes_little(normalizer: Fields) -> bool:
    """NFC: readers of GGUF leave it out, and text is in that form nearly always."""
    steps = normalizer.objects("normalizers")
    return normalizer.get("type") == "NFC" or (
        normalizer.get("type") == "Sequence" and all(_changes_little(step) for step in steps)
    )


def _steps(whole: Fields) -> list[Fields]:
    pre = whole.section("pre_tokenizer")
    if pre is None:
        return []
    return pre.objects("pretokenizers") if pre.get("type") == "Sequence" else [pre]


def _name(whole: Fields, config: Fields, ignore_merges: bool) -> str:
    """What `tokenizer.ggml.pre` is; of several that cut alike, the one that also cleans as this one does."""
    splits = tuple(each for step in _steps(whole) for each in _splits(step))
    other = IN_OTHER_WORDS.get(splits[0]) if len(splits) == 1 else None
    wanted = PRETOKENIZERS[other].splits if other else tuple(_in_readers_words(each) for each in splits)
    alike = {
        name: pre
        for name, pre in PRETOKENIZERS.items()
        if pre.splits == wanted and pre.ignore_merges == ignore_merges and not pre.spaces_as_symbol
    }
    if not alike:
        raise UnsupportedError(
            f"tokenizer.json: pre_tokenizer cuts by {shown(' then '.join(splits))!r}"
            f"{' and ignores merges of whole words' if ignore_merges else ''}; GGUF has no name for that "
            f"(known are those of {', '.join(USUAL)} and {len(PRETOKENIZERS) - len(USUAL)} more)"
        )
    if config.has("clean_up_tokenization_spaces"):
        is_clean = config.flag("clean_up_tokenization_spaces", False)
        alike = {name: pre for name, pre in alike.items() if pre.clean_spaces == is_clean} or alike
    return next((name for name in USUAL if name in alike), next(iter(alike)))


def _splits(step: Fields) -> Iterator[str]:
    """The expressions of one step of tokenizer.json."""
    match step.get("type"):
        case "ByteLevel":
            if step.flag("add_prefix_space", True):
                raise UnsupportedError(
                    "tokenizer.json: ByteLevel adds a space before text; GGUF cannot say that"
                )
            if step.flag("use_regex", True):
                yield _GPT2
        case "Digits":
            yield _NUMBER if step.flag("individual_digits", False) else _NUMBER + "+"
        case "Split" if step.get("behavior") in ("Isolated", "Removed") and (
            step.get("behavior") == "Isolated" or step.flag("invert", False)
        ):
            pattern = step.section("pattern")
            yield pattern.text("Regex", "") or pattern.text("String") if pattern else ""
        case kind:
            raise UnsupportedError(
                f"tokenizer.json: a step of pre_tokenizer is {shown(str(kind))} "
                f"({shown(str(step.get('behavior')))}); "
                "converted are ByteLevel, Digits and Split (Isolated)"
            )


def _in_readers_words(expression: str) -> str:
    return expression.replace(_CONTRACTION, CONTRACTION_READ)
