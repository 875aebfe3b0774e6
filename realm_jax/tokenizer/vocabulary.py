"""The tokens of a model: texts, kinds, scores and special ids, with llama.cpp's defaults and repairs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from realm_jax.errors import UnsupportedError
from realm_jax.tokenizer.metadata import MAX_TOKEN_CHARACTERS, MAX_TOKENS, Metadata
from realm_jax.tokenizer.pretokenizers import PRETOKENIZERS, PreTokenizer
from realm_jax.tokenizer.special_tokens import (
    ALWAYS_SHOWN,
    END_OF_GENERATION,
    END_OF_TURN,
    FIM_ENDS,
    FIM_PARTS,
)

SPACE = "\u2581"  # SentencePiece's visible space


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as stored in GGUF files."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL_TYPES = frozenset({TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN})


@dataclass(frozen=True)
class Family:
    """What `tokenizer.ggml.model` implies where the file says nothing."""

    name: str
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    sep: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    clean_spaces: bool = False


FAMILIES = {
    "llama": Family("SPM", bos=1, eos=2, unk=0, add_bos=True, add_space_prefix=True),
    "bert": Family("WordPiece", bos=101, unk=100, sep=102, pad=0, add_bos=True, clean_spaces=True),
    "t5": Family("Unigram", eos=1, unk=2, pad=0, add_eos=True),
    "gpt2": Family("BPE"),
    "gemma4": Family("BPE"),
}

_ID_KEYS = {
    "bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "sep": "seperator",
    "pad": "padding", **{name: name for name, _ in FIM_ENDS + FIM_PARTS},
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """All facts of a tokenizer but its algorithm. `tokens[i]` is the text of id i, `ids` its inverse."""

    family: Family
    pre: str | None
    pretokenizer: PreTokenizer | None
    tokens: list[str]
    ids: dict[str, int]
    types: list[int]
    scores: list[float]
    bos: int | None
    eos: int | None
    unk: int | None
    pad: int | None
    sep: int | None
    eog: frozenset[int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    clean_spaces: bool
    lstrip: frozenset[int]
    rstrip: frozenset[int]


def read_vocabulary(meta: Metadata) -> Vocabulary:
    """The vocabulary that a file states; raises ModelFileError or UnsupportedError naming the key."""
    model = meta.text("tokenizer.ggml.model")
    if model not in FAMILIES:
        raise UnsupportedError(
            f"{meta.source}: tokenizer.ggml.model is {model or 'missing'!r}; "
            f"supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model]
    pre, pretokenizer = _read_pretokenizer(meta, model)
    tokens, ids = _read_tokens(meta)
    types = _read_types(meta, tokens)
    special = {
        name: meta.token_id(f"tokenizer.ggml.{key}_token_id", len(tokens)) for name, key in _ID_KEYS.items()
    }
    for name in ("bos", "eos", "unk", "sep", "pad"):
        default = getattr(family, name)
        if special[name] is None and default is not None and default < len(tokens):
            special[name] = default
    if family.name == "BPE":
        _falcon_default(special, types, pre)
    eog = _end_ids(ids, types, special)

    default_bos = family.add_bos or (pretokenizer is not None and pretokenizer.add_bos)
    add_bos = meta.flag("tokenizer.ggml.add_bos_token", default_bos)
    add_eos = meta.flag("tokenizer.ggml.add_eos_token", family.add_eos)
    if pretokenizer and pretokenizer.add_bos and pretokenizer.spaces_as_symbol:
        add_bos = True  # files of gemma4 say false and mean true
    if family.name == "WordPiece":
        add_bos = True  # BERT reads [CLS] text [SEP], whatever the file says
    for wanted, name in ((add_bos, "bos"), (add_eos, "eos"), (family.sep is not None, "sep")):
        if wanted and special[name] is None:
            raise meta.error(
                f"tokenizer.ggml.{name}_token_id", f"is missing, and a text needs its {name} token"
            )
    lstrip, rstrip = _stripping(meta, ids, types)
    return Vocabulary(
        family=family, pre=pre, pretokenizer=pretokenizer, tokens=tokens, ids=ids, types=types,
        scores=_read_scores(meta, len(tokens)), bos=special["bos"], eos=special["eos"], unk=special["unk"],
        pad=special["pad"], sep=special["sep"], eog=eog, add_bos=add_bos, add_eos=add_eos,
        add_space_prefix=meta.flag("tokenizer.ggml.add_space_prefix", family.add_space_prefix),
        clean_spaces=pretokenizer.clean_spaces if pretokenizer else family.clean_spaces,
        lstrip=lstrip, rstrip=rstrip,
    )  # fmt: skip


def _read_pretokenizer(meta: Metadata, model: str) -> tuple[str | None, PreTokenizer | None]:
    if FAMILIES[model].name != "BPE":
        return None, None
    pre = "gemma4" if model == "gemma4" else meta.text("tokenizer.ggml.pre") or "default"
    if pre not in PRETOKENIZERS:
        raise UnsupportedError(
            f"{meta.source}: tokenizer.ggml.pre is {pre!r}, a pre-tokenizer this version does not know"
        )
    return pre, PRETOKENIZERS[pre]


def _read_tokens(meta: Metadata) -> tuple[list[str], dict[str, int]]:
    key = "tokenizer.ggml.tokens"
    tokens = meta.strings(key, MAX_TOKENS)
    if not tokens:
        raise meta.error(key, "is empty")
    if "" in tokens:
        tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        first = next(i for i, token in enumerate(tokens) if ids[token] != i)
        raise meta.error(key, f"has {tokens[first][:60]!r} twice: ids {first} and {ids[tokens[first]]}")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_CHARACTERS:
        raise meta.error(key, f"has a token of {longest:,} characters; the limit is {MAX_TOKEN_CHARACTERS:,}")
    return tokens, ids


def _read_types(meta: Metadata, tokens: list[str]) -> list[int]:
    key = "tokenizer.ggml.token_type"
    array = meta.numbers(key, len(tokens), "iu")
    if array is None:
        return [int(TokenType.NORMAL)] * len(tokens)
    unknown = np.flatnonzero((array < TokenType.UNDEFINED) | (array > TokenType.BYTE))
    if len(unknown):
        raise meta.error(
            key, f"is {array[unknown[0]]} for token {unknown[0]}; types are 0 to {int(TokenType.BYTE)}"
        )
    types = array.tolist()
    for i in np.flatnonzero(array == TokenType.BYTE).tolist():
        if byte_of(tokens[i]) is None:
            raise meta.error(
                key, f"calls token {i} a byte, but its text is {tokens[i][:60]!r}, not <0x00> to <0xFF>"
            )
    return types


def byte_of(token: str) -> int | None:
    """The byte that `<0xXX>` stands for; None for any other text."""
    if len(token) != 6 or not token.startswith("<0x") or token[5] != ">":
        return None
    digits = token[3:5]
    return int(digits, 16) if all(digit in "0123456789abcdefABCDEF" for digit in digits) else None


def _read_scores(meta: Metadata, length: int) -> list[float]:
    key = "tokenizer.ggml.scores"
    array = meta.numbers(key, length, "iuf")
    if array is None:
        return [0.0] * length
    bad = np.flatnonzero(np.isnan(array))
    if len(bad):
        raise meta.error(key, f"is NaN for token {bad[0]}")
    return array.astype(np.float32).tolist()


def _falcon_default(special: dict[str, int | None], types: list[int], pre: str | None) -> None:
    """Give BPE files without BOS or EOS llama.cpp's default, 11, where that is a control token as in Falcon.

    Elsewhere 11 is a comma or the like: better no end token than that one.
    """
    if len(types) > 11 and types[11] == TokenType.CONTROL:
        special["eos"] = 11 if special["eos"] is None else special["eos"]
        if special["bos"] is None and pre not in ("glm4", "chatglm-bpe"):
            special["bos"] = 11


def _first(ids: Mapping[str, int], texts: Iterable[str]) -> int | None:
    return min((ids[text] for text in texts if text in ids), default=None)


def _end_ids(ids: Mapping[str, int], types: list[int], special: dict[str, int | None]) -> frozenset[int]:
    """The ids that end generation. Marks tokens in `types` whose texts tell more than the file's types."""
    for name, texts in (("eot", END_OF_TURN), ("eom", ("<|eom_id|>",)), *FIM_PARTS, *FIM_ENDS):
        if special[name] is None:
            special[name] = _first(ids, texts)
            if (found := special[name]) is not None:
                types[found] = TokenType.CONTROL
    ends = {ids[text] for text in END_OF_GENERATION if text in ids}
    for token in ends:
        types[token] = TokenType.CONTROL
    for text in ALWAYS_SHOWN:
        if text in ids:
            types[ids[text]] = TokenType.USER_DEFINED
    ends |= {special[name] for name in ("eos", "eot", "eom", *(n for n, _ in FIM_ENDS))} - {None}

    def has(*texts: str) -> bool:
        return any(ids.get(text) in ends for text in texts)

    # In gpt-oss and solar-open a message ends there, not the answer; in gemma4 </s> is a tag of HTML.
    if has("<|end|>") and has("<|call|>", "<|calls|>") and has("<|return|>", "<|flush|>"):
        ends.remove(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if has("<|tool_response>") and has("</s>"):
        ends.remove(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
    return frozenset(end for end in ends if end is not None)


def _stripping(
    meta: Metadata, ids: Mapping[str, int], types: list[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Special tokens that swallow the white space before and after them: GGUF does not say, the names do."""
    name = meta.text("general.name").lower()
    pre = meta.text("tokenizer.ggml.pre")
    architecture = meta.text("general.architecture")
    bert_like = any(part in pre for part in ("jina-v2-de", "jina-v2-es", "jina-v2-code"))
    if bert_like or any(part in architecture for part in ("nomic-bert-moe", "jina-bert-v3")):
        return frozenset({ids["<mask>"]} if "<mask>" in ids else ()), frozenset()
    if "phi-3" in name or "phi3" in name:
        kept = {ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")}
        special = {i for i, kind in enumerate(types) if kind in SPECIAL_TYPES}
        return frozenset(), frozenset(special - kept)
    if "modern-bert" in name:
        return frozenset({ids["[MASK]"]} if "[MASK]" in ids else ()), frozenset()
    return frozenset(), frozenset()


def require_unicode(meta: Metadata, tokens: list[str]) -> None:
    """The tokenizers library takes valid Unicode only."""
    for i, token in enumerate(tokens):
        if not token.isascii():
            try:
                token.encode()
            except UnicodeEncodeError:
                raise meta.error(
                    "tokenizer.ggml.tokens", f"has token {i}, {token[:60]!r}: not UTF-8"
                ) from None
