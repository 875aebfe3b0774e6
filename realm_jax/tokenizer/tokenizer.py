"""Tokenizer: what the engine and the command line see of a model's vocabulary."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from realm_jax.errors import RequestError
from realm_jax.tokenizer.merges import RankedMerges, ScoreMerges
from realm_jax.tokenizer.metadata import Metadata
from realm_jax.tokenizer.stream import clean_spaces
from realm_jax.tokenizer.unigram import Unigram
from realm_jax.tokenizer.vocabulary import (
    SPACE,
    SPECIAL_TYPES,
    TokenType,
    Vocabulary,
    byte_of,
    read_vocabulary,
)
from realm_jax.tokenizer.wordpiece import WordPiece

# GPT-2 writes each byte as a printable letter: itself where it is one, else the next free letter from U+0100.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_HIDDEN)
}
_C_SPACES = " \t\n\v\f\r"


Algorithm = RankedMerges | ScoreMerges | WordPiece | Unigram


def _algorithm(meta: Metadata, vocabulary: Vocabulary) -> Algorithm:
    match vocabulary.family.name:
        case "SPM":
            return ScoreMerges(vocabulary)
        case "WordPiece":
            lowercase = meta.flag("tokenizer.ggml.normalizer.lowercase", True)
            return WordPiece(
                vocabulary, lowercase, meta.flag("tokenizer.ggml.normalizer.strip_accents", lowercase)
            )
        case "Unigram":
            return Unigram(meta, vocabulary)
        case _:
            return RankedMerges(meta, vocabulary)


class Tokenizer:
    """Text to token ids and back, with the ids that llama.cpp gives."""

    def __init__(self, vocabulary: Vocabulary, algorithm: Algorithm) -> None:
        self._vocabulary = vocabulary
        self._algorithm = algorithm
        self._bytes: dict[int, bytes] = {}
        tokens, types = vocabulary.tokens, vocabulary.types
        special = [i for i, kind in enumerate(types) if kind in SPECIAL_TYPES]
        # Longest first, whichever stands first in the text: llama.cpp's order.
        special.sort(key=lambda i: -len(tokens[i].encode("utf-8", "surrogateescape")))
        self._all_special = special
        self._always_read = [i for i in special if types[i] == TokenType.USER_DEFINED]

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a GGUF file, which may hold a vocabulary only."""
        from realm_jax import gguf

        return cls.from_metadata(gguf.open(path).metadata, source=str(path))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str = "metadata") -> "Tokenizer":
        """The tokenizer that `tokenizer.ggml.*` describes.

        Raises ModelFileError naming `source`, key and value, or UnsupportedError for a model or pre-tokenizer
        that this version does not know.
        """
        meta = Metadata(metadata, source)
        vocabulary = read_vocabulary(meta)
        return cls(vocabulary, _algorithm(meta, vocabulary))

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary.tokens)

    @property
    def bos_id(self) -> int | None:
        return self._vocabulary.bos

    @property
    def eos_id(self) -> int | None:
        return self._vocabulary.eos

    @property
    def unk_id(self) -> int | None:
        return self._vocabulary.unk

    @property
    def pad_id(self) -> int | None:
        return self._vocabulary.pad

    @property
    def eog_ids(self) -> frozenset[int]:
        """The ids that end generation: EOS, end of turn, end of message and their like."""
        return self._vocabulary.eog

    @property
    def add_bos(self) -> bool:
        return self._vocabulary.add_bos

    @property
    def add_eos(self) -> bool:
        return self._vocabulary.add_eos

    @property
    def clean_spaces(self) -> bool:
        """Whether decoding removes spaces before punctuation and English contractions."""
        return self._vocabulary.clean_spaces

    @property
    def kind(self) -> str:
        name, pre = self._vocabulary.family.name, self._vocabulary.pre
        return f"{name} ({pre})" if pre else name

    def token_to_id(self, text: str) -> int | None:
        return self._vocabulary.ids.get(text)

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary spells it."""
        return self._vocabulary.tokens[self._checked(token_id)]

    def is_special(self, token_id: int) -> bool:
        """Whether the token controls the model and is no text: `skip_special` leaves it out."""
        kind = self._vocabulary.types[self._checked(token_id)]
        return kind in (TokenType.CONTROL, TokenType.UNKNOWN)

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, special tokens written out."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(self._checked(token_id))
        return known

    def encode(
        self, text: str, add_special: bool = True, parse_special: bool = False, *, continues: bool = False
    ) -> list[int]:
        """The ids of a text.

        `add_special` adds BOS and EOS where the model wants them; `parse_special` reads the texts of control
        tokens as these tokens. User-defined tokens are always read. `continues`: the text goes on behind
        another, so that SentencePiece models add no space before it.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text has U+{ord(text[error.start]):04X} at {error.start}: not Unicode text"
            ) from None
        vocabulary = self._vocabulary
        ids = [vocabulary.bos] if add_special and vocabulary.add_bos and vocabulary.bos is not None else []
        after_special = not continues
        for part in self._parts(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                prefix = (
                    " "
                    if after_special and vocabulary.family.name == "SPM" and vocabulary.add_space_prefix
                    else ""
                )
                ids += self._algorithm.encode(prefix + part)
            after_special = isinstance(part, int)
        last = vocabulary.sep if vocabulary.family.name == "WordPiece" else vocabulary.eos
        if add_special and last is not None and (vocabulary.add_eos or vocabulary.family.name == "WordPiece"):
            ids.append(last)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False, *, continues: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD.

        SentencePiece models begin a text with a space that is not part of it and is removed here, unless the
        ids continue a text: `continues`.
        """
        first = not continues
        out = []
        for token_id in ids:
            out.append(self.piece(token_id, skip_special, first))
            first = False
        text = b"".join(out).decode("utf-8", "replace")
        return clean_spaces(text) if self.clean_spaces else text

    def piece(self, token_id: int, skip_special: bool, first: bool) -> bytes:
        """The bytes of one token within a text, of which it may be the first."""
        if skip_special and self.is_special(token_id):
            return b""
        piece = self.token_bytes(token_id)
        return piece.removeprefix(b" ") if first and self._vocabulary.add_space_prefix else piece

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < len(self._vocabulary.tokens):
            raise RequestError(
                f"token id is {token_id}; the vocabulary has {len(self._vocabulary.tokens):,} tokens"
            )
        return int(token_id)

    def _spell(self, token_id: int) -> bytes:
        token, kind = self._vocabulary.tokens[token_id], self._vocabulary.types[token_id]
        if kind in SPECIAL_TYPES:
            return token.encode("utf-8", "surrogateescape")
        if kind == TokenType.BYTE:
            byte = byte_of(token)
            return b"" if byte is None else bytes([byte])
        if kind != TokenType.NORMAL:
            return b""
        pre = self._vocabulary.pretokenizer
        if pre is None or pre.spaces_as_symbol:
            return token.replace(SPACE, " ").encode("utf-8", "surrogateescape")
        return b"".join(
            bytes([_BYTE_OF_LETTER[letter]]) if letter in _BYTE_OF_LETTER else letter.encode()
            for letter in token
        )

    def _parts(self, text: str, parse_special: bool) -> list[str | int]:
        """The text, cut at special tokens; these as ids."""
        vocabulary = self._vocabulary
        parts: list[str | int] = [text] if text else []
        for token_id in self._all_special if parse_special else self._always_read:
            token = vocabulary.tokens[token_id]
            if token in text:
                parts = [new for part in parts for new in self._cut(part, token, token_id)]
        return parts

    def _cut(self, part: str | int, token: str, token_id: int) -> Iterable[str | int]:
        if isinstance(part, int) or token not in part:
            return [part]
        texts = part.split(token)
        if token_id in self._vocabulary.rstrip:
            texts[1:] = [text.lstrip(_C_SPACES) for text in texts[1:]]
        if token_id in self._vocabulary.lstrip:
            texts[:-1] = [text.rstrip(_C_SPACES) for text in texts[:-1]]
        cut: list[str | int] = []
        for text in texts:
            cut += [text, token_id] if text else [token_id]
        return cut[:-1]
