"""SentencePiece's Unigram model, as T5 uses it: normalization here, the search in the tokenizers library."""

import numpy as np
import tokenizers
from tokenizers import models

from realm_jax.tokenizer.metadata import Metadata
from realm_jax.tokenizer.vocabulary import SPACE, TokenType, Vocabulary, require_unicode


class Unigram:
    """The segmentation of the highest total score (Kudo 2018), after SentencePiece's normalization."""

    def __init__(self, meta: Metadata, vocabulary: Vocabulary) -> None:
        if vocabulary.unk is None:
            raise meta.error("tokenizer.ggml.unknown_token_id", "is missing, and Unigram needs it")
        require_unicode(meta, vocabulary.tokens)
        # Ids are positions, so tokens that text must not produce stay, under a text that no input contains.
        pieces = []
        for i, kind in enumerate(vocabulary.types):
            if kind in (TokenType.NORMAL, TokenType.UNUSED):
                pieces.append((vocabulary.tokens[i], vocabulary.scores[i]))
            else:
                shown = vocabulary.tokens[i] if kind == TokenType.USER_DEFINED else f"\uffff{i}"
                pieces.append((shown, 0.0))
        self._tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, vocabulary.unk, False))
        self._characters = CharacterMap(meta)
        self._merge_spaces = meta.flag("tokenizer.ggml.remove_extra_whitespaces", False)
        self._prefix = SPACE if vocabulary.add_space_prefix else ""

    def encode(self, text: str) -> list[int]:
        text = self._characters.apply(text).replace("\uffff", "\ufffd")
        if self._merge_spaces:
            text = "".join(SPACE + word for word in text.split(" ") if word)
        else:
            words = text.lstrip(" ")
            indent = SPACE * (len(text) - len(words))
            text = indent + (self._prefix + words.replace(" ", SPACE) if words else "")
        return self._tokenizer.encode(text, add_special_tokens=False).ids


class CharacterMap:
    """SentencePiece's precompiled normalization: the longest known prefix is replaced, again and again.

    The prefixes lie in an XOR-compressed double array (Kanda 2018). A unit holds the byte that leads to it
    (bits 0-7), whether a replacement hangs below it (bit 8), and the offset to its children (bits 10-30,
    times 256 if bit 9 is set). The replacements are strings, each ended by a zero byte.
    """

    KEY = "tokenizer.ggml.precompiled_charsmap"

    def __init__(self, meta: Metadata) -> None:
        """Raises ModelFileError if an index of the map leaves it."""
        array = meta.numbers(self.KEY, None, "iu")
        blob = b"" if array is None else array.astype(np.uint8).tobytes()
        size = int.from_bytes(blob[:4], "little")
        if blob and (size % 4 or size == 0 or 4 + size >= len(blob) or blob[-1] != 0):
            raise meta.error(self.KEY, f"states an array of {size:,} bytes, but has {len(blob):,} in all")
        units = np.frombuffer(blob, "<u4", count=size // 4, offset=min(4, len(blob)))
        self._units: list[int] = units.tolist()
        self._replacements = blob[4 + size :]
        self._meta = meta

    def apply(self, text: str) -> str:
        if not self._units:
            return text
        data, out, at = text.encode(), bytearray(), 0
        while at < len(data):
            length, replacement = self._longest(data, at)
            out += replacement
            at += length
        return out.decode("utf-8", "replace")

    def _longest(self, data: bytes, start: int) -> tuple[int, bytes]:
        """How many bytes are replaced, and by what; one character by itself where the map has no prefix."""
        found: tuple[int, int] | None = None
        node = self._children(0)
        for at in range(start, len(data)):
            byte = data[at]
            node ^= byte
            if byte == 0 or self._unit(node) & 0x800000FF != byte:
                break
            has_replacement = self._unit(node) >> 8 & 1
            node ^= self._children(node)
            if has_replacement:
                found = at + 1 - start, self._unit(node) & 0x7FFFFFFF
        if found is None:
            width = 1 + (data[start] >= 0xC0) + (data[start] >= 0xE0) + (data[start] >= 0xF0)
            return width, data[start : start + width]
        length, offset = found
        if offset >= len(self._replacements):
            raise self._meta.error(
                self.KEY, f"has a replacement at {offset:,} of {len(self._replacements):,} bytes"
            )
        return length, self._replacements[offset : self._replacements.index(0, offset)]

    def _unit(self, node: int) -> int:
        if node >= len(self._units):
            raise self._meta.error(self.KEY, f"refers to unit {node:,} of {len(self._units):,}")
        return self._units[node]

    def _children(self, node: int) -> int:
        unit = self._unit(node)
        return unit >> 10 << ((unit & 0x200) >> 6)
