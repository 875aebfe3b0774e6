"""BERT's WordPiece, normalized as llama.cpp does, which is not quite what the tokenizers library does."""

import unicodedata
from functools import lru_cache

from realm_jax.tokenizer.vocabulary import SPACE, Vocabulary


class WordPiece:
    """BERT's longest match first: a word is its longest known prefix, then the longest of the rest, and on.

    In GGUF a piece that starts a word is marked by U+2581 and the others by nothing.
    """

    def __init__(self, vocabulary: Vocabulary, lowercase: bool, strip_accents: bool) -> None:
        self._ids = vocabulary.ids
        self._unk = [] if vocabulary.unk is None else [vocabulary.unk]
        self._longest = max(map(len, vocabulary.tokens))
        self._characters = _BertCharacters(lowercase, strip_accents)
        self._pieces_cached = lru_cache(maxsize=1 << 16)(self._pieces)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in text.translate(self._characters).split(" "):
            if word:
                ids += self._pieces_cached(word) if len(word) <= 64 else self._pieces(word)
        return ids

    def _pieces(self, word: str) -> list[int]:
        word = SPACE + word
        ids, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                if (token := self._ids.get(word[start:end])) is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return self._unk
        return ids


class _BertCharacters(dict[int, str]):
    """For `str.translate`: white space to a space, punctuation and Chinese set apart, the rest normalized."""

    def __init__(self, lowercase: bool, strip_accents: bool) -> None:
        super().__init__()
        self._lowercase, self._strip_accents = lowercase, strip_accents

    def __missing__(self, code: int) -> str:
        self[code] = self._normalized(chr(code))
        return self[code]

    def _normalized(self, character: str) -> str:
        if self._strip_accents:
            character = unicodedata.normalize("NFD", character)[0]
        category = unicodedata.category(character)
        if category[0] == "Z" or character in "\t\n\v\f\r\x85":
            return " "
        if character in "\0\ufffd" or (category[0] == "C" and category != "Cn"):
            return ""
        if self._strip_accents and category[0] == "M":
            return ""
        lowered = character.lower()[0] if self._lowercase else character
        apart = category[0] == "P" or (category[0] == "S" and character < "\x7f") or _is_chinese(character)
        return f" {lowered} " if apart else lowered


def _is_chinese(character: str) -> bool:
    return (
        "\u4e00" <= character <= "\u9fff"
        or "\u3400" <= character <= "\u4dbf"
        or "\uf900" <= character <= "\ufaff"
        or "\U00020000" <= character <= "\U0002a6df"
        or "\U0002a700" <= character <= "\U0002b81f"
        or "\U0002b920" <= character <= "\U0002ceaf"  # BERT's own slip for 2B820
        or "\U0002f800" <= character <= "\U0002fa1f"
    )
