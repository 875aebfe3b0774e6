"""The tokens of a tokenizer.json: those of its model, and those that were added."""

from collections.abc import Iterator
from dataclasses import dataclass

from realm_jax.convert.fields import Fields
from realm_jax.errors import UnsupportedError
from realm_jax.lora.fitting import shown
from realm_jax.tokenizer.vocabulary import TokenType

LOOKS_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))


@dataclass(frozen=True)
class Added:
    """A token that is looked for before the text is cut."""

    id: int
    text: str
    is_special: bool
    strips: bool

    @property
    def type(self) -> TokenType:
        """Control, also where only the text tells, as converters of llama.cpp see it; else it is text."""
        looks = self.text in LOOKS_SPECIAL or any(
            self.text.startswith(start) and self.text.endswith(end) for start, end in BRACKETS
        )
        return TokenType.CONTROL if self.is_special or looks else TokenType.USER_DEFINED


@dataclass(frozen=True)
class HFVocabulary:
    """size: of the model, which may have room for more tokens than there are."""

    size: int
    by_id: dict[int, str]
    ids: dict[str, int]
    added: dict[int, Added]

    @classmethod
    def read(cls, whole: Fields, size: int) -> "HFVocabulary":
        """Raises ModelFileError for ids beyond `size`, and for two tokens of one id."""
        model = whole.section("model")
        if model is None or not isinstance(model.get("vocab"), dict):
            raise UnsupportedError(
                "tokenizer.json: model.vocab is no object (converted are models of type BPE)"
            )
        added = {each.id: each for each in _added(whole, size)}
        ids: dict[str, int] = dict(model.get("vocab"))
        ids |= {each.text: each.id for each in added.values()}
        by_id: dict[int, str] = {}
        for text, number in ids.items():
            if type(number) is not int or not 0 <= number < size:
                raise model.error(
                    "vocab", f"has {shown(text)!r} as {number!r:.20}; the model has {size:,} tokens"
                )
            if number in by_id:
                raise model.error("vocab", f"has {number} twice: {shown(by_id[number])!r}, {shown(text)!r}")
            by_id[number] = text
        return cls(size, by_id, ids, added)

    def texts(self) -> list[str]:
        """By id; places without a token have names that llama.cpp's converter gives."""
        return [self.by_id.get(number, f"[PAD{number}]") for number in range(self.size)]


def _added(whole: Fields, size: int) -> Iterator[Added]:
    for each in whole.objects("added_tokens"):
        number = each.count("id", size - 1, least=0)
        strips = each.flag("lstrip", False) or each.flag("rstrip", False)
        yield Added(number, each.text("content"), each.flag("special", False), strips)


def merges_of(model: Fields, vocabulary: HFVocabulary) -> list[tuple[str, str]]:
    """The pairs that are merged, in order; written as pairs or with a space between."""
    value = model.get("merges")
    if not isinstance(value, list):
        raise model.error("merges", "is no list")
    found = []
    for i, each in enumerate(value):
        pair = each.split(" ") if isinstance(each, str) else each
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise model.error("merges", f"has entry {i}, {shown(str(each))!r}, which is no pair")
        left, right = pair
        if not all(text in vocabulary.ids for text in (left, right, left + right)):
            raise model.error("merges", f"has entry {i}, {shown(str(each))!r}: no token of model.vocab")
        found.append((left, right))
    return found
