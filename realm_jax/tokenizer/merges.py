"""Byte pair encoding, by a list of merges (in the tokenizers library) and by scores (here).

SentencePiece's BPE merges by score and, among equals, leftmost first. No list of merges can state that: two
splits of one token would need the same rank. So it is written out.
"""

import heapq
import re
from functools import lru_cache
from operator import add

import tokenizers
from tokenizers import models, pre_tokenizers

from realm_jax.tokenizer.metadata import Metadata
from realm_jax.tokenizer.vocabulary import SPACE, Vocabulary, require_unicode

MAX_MERGES = 1 << 25


class RankedMerges:
    """BPE by a list of merges, over the letters that stand for bytes or, for gemma4, over characters."""

    def __init__(self, meta: Metadata, vocabulary: Vocabulary) -> None:
        pre = vocabulary.pretokenizer
        assert pre is not None
        require_unicode(meta, vocabulary.tokens)
        self._raw = pre.spaces_as_symbol
        model = models.BPE(
            vocab=vocabulary.ids,
            merges=_read_merges(meta, vocabulary.ids),
            ignore_merges=pre.ignore_merges,
            byte_fallback=self._raw,
        )
        self._tokenizer = tokenizers.Tokenizer(model)
        steps: list[pre_tokenizers.PreTokenizer] = [
            pre_tokenizers.Split(tokenizers.Regex(split), "isolated") for split in pre.splits
        ]
        if not self._raw:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        self._ids = vocabulary.ids
        self._whole_newlines = vocabulary.pre in ("gemma4", "granite-embed-multi-311m")

    def encode(self, text: str) -> list[int]:
        if self._raw:
            text = text.replace(" ", SPACE)
        if not self._whole_newlines:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for line in re.findall(r"[^\n]+|\n+", text):
            known = self._ids.get(line) if line[0] == "\n" else None
            ids += self._tokenizer.encode(line, add_special_tokens=False).ids if known is None else [known]
        return ids


def _read_merges(meta: Metadata, ids: dict[str, int]) -> list[tuple[str, str]]:
    key = "tokenizer.ggml.merges"
    merges = []
    for i, merge in enumerate(meta.strings(key, MAX_MERGES)):
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise meta.error(key, f"has entry {i}, {merge[:60]!r}: both parts and their sum must be tokens")
        merges.append((left, right))
    return merges


class ScoreMerges:
    """SentencePiece's BPE: merge the pair of neighbours whose sum is the token of the highest score."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._ids = vocabulary.ids
        self._scores = vocabulary.scores
        unk = [] if vocabulary.unk is None else [vocabulary.unk]
        self._bytes = [_byte_ids(vocabulary.ids, byte) or unk for byte in range(256)]
        # No merge joins two characters that stand side by side in no token: text can be cut there, exactly.
        self._inside: set[str] = set()
        for token in vocabulary.tokens:
            self._inside.update(map(add, token, token[1:]))
        self._merge_cached = lru_cache(maxsize=1 << 16)(self._merge)

    def encode(self, text: str) -> list[int]:
        text = text.replace(" ", SPACE)
        inside = self._inside
        cuts = [i for i, pair in enumerate(map(add, text, text[1:]), 1) if pair not in inside]
        ids: list[int] = []
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            word = text[start:end]
            ids += self._merge_cached(word) if len(word) <= 64 else self._merge(word)
        return ids

    def _merge(self, word: str) -> tuple[int, ...]:
        symbols: list[str | None] = list(word)
        before = list(range(-1, len(symbols) - 1))
        after = list(range(1, len(symbols) + 1))
        queue: list[tuple[float, int, int, str]] = []

        def consider(left: int, right: int) -> None:
            if left >= 0 and right < len(symbols):
                text = f"{symbols[left]}{symbols[right]}"
                if (token := self._ids.get(text)) is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, text))

        for i in range(1, len(symbols)):
            consider(i - 1, i)
        while queue:
            _, left, right, text = heapq.heappop(queue)
            if symbols[left] is None or symbols[right] is None or f"{symbols[left]}{symbols[right]}" != text:
                continue  # one of the two was merged with another neighbour since
            symbols[left], symbols[right] = text, None
            after[left] = after[right]
            if after[left] < len(symbols):
                before[after[left]] = left
            consider(before[left], left)
            consider(left, after[left])
        return tuple(token for symbol in symbols if symbol is not None for token in self._of(symbol))

    def _of(self, symbol: str) -> list[int]:
        token = self._ids.get(symbol)
        if token is not None:
            return [token]
        return [token for byte in symbol.encode() for token in self._bytes[byte]]


def _byte_ids(ids: dict[str, int], byte: int) -> list[int]:
    token = ids.get(f"<0x{byte:02X}>", ids.get(chr(byte)) if byte < 0x80 else None)
    return [] if token is None else [token]
