"""A folder's tokenizer as GGUF's keys: tokens, their kinds, special ids, chat templates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from realm_jax.convert import byte_level, sentence_piece
from realm_jax.convert.fields import MAX_TOKENIZER, Fields, read_object, read_text
from realm_jax.convert.folder import HFFolder
from realm_jax.convert.vocabularies import HFVocabulary
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.fitting import shown
from realm_jax.tokenizer.special_tokens import END_OF_GENERATION
from realm_jax.tokenizer.vocabulary import SPECIAL_TYPES

MAX_TEMPLATE = 1 << 20
NEVER_STRIPPING = {"<unk>", "<s>", "<|endoftext|>"}  # of Phi-3
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}


@dataclass(frozen=True)
class HFTokenizer:
    """keys: of GGUF's metadata. notes: what GGUF cannot say, for the user.

    stripping: tokens that swallow white space. GGUF has no word for them; by the name Phi-3 readers know.
    """

    keys: dict[str, Any]
    notes: tuple[str, ...]
    stripping: tuple[str, ...]

    def names_phi3(self) -> bool:
        """Whether they are those that readers of GGUF give a model of that name."""
        types = self.keys["tokenizer.ggml.token_type"]
        special = {
            text
            for text, kind in zip(self.keys["tokenizer.ggml.tokens"], types, strict=True)
            if kind in SPECIAL_TYPES
        }
        return "<|end|>" in special and set(self.stripping) == special - NEVER_STRIPPING


def read_tokenizer(folder: HFFolder, facts: Fields, size: int) -> HFTokenizer:
    """The tokenizer, its vocabulary filled up to `size` tokens.

    Raises UnsupportedError, with those that are known, for one that GGUF has no word for.
    """
    path = folder.path / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedError(
            f"{folder.path.name}: no tokenizer.json (make one: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER) in transformers)"
        )
    whole = read_object(path, most=MAX_TOKENIZER)
    config = read_object(folder.path / "tokenizer_config.json", required=False)
    vocabulary = HFVocabulary.read(whole, size)
    kinds = (byte_level, sentence_piece)
    kind = next((each for each in kinds if each.is_one(whole)), None)
    if kind is None:
        model = whole.section("model")
        raise UnsupportedError(
            f"tokenizer.json: model is {shown(str(model and model.get('type')))} with its pre_tokenizer; "
            "converted are byte-level BPE, and BPE with byte_fallback as of SentencePiece"
        )
    keys, notes = kind.keys(whole, config, vocabulary)
    keys |= {
        "tokenizer.ggml.tokens": vocabulary.texts(),
        **_special(whole, config, facts, folder, vocabulary),
    }
    keys["tokenizer.ggml.token_type"] = np.array(list(kind.types(whole, vocabulary)), np.int32)
    keys |= _templates(folder, config)
    stripping = tuple(each.text for each in vocabulary.added.values() if each.strips)
    return HFTokenizer(keys, tuple(notes), stripping)


def _special(
    whole: Fields, config: Fields, facts: Fields, folder: HFFolder, vocabulary: HFVocabulary
) -> dict[str, Any]:
    """The ids with a meaning: by the texts of tokenizer_config.json, else by the ids of the other files."""
    keys: dict[str, Any] = {}
    ends = _ids(folder.generation, "eos_token_id", vocabulary) or _ids(facts, "eos_token_id", vocabulary)
    for name, gguf_name in SPECIAL.items():
        found = _named(config, f"{name}_token", vocabulary)
        if found is None and not config.has(f"{name}_token"):
            said = ends if name == "eos" else _ids(facts, f"{name}_token_id", vocabulary)
            found = said[0] if said else None
        if found is not None:
            keys[f"tokenizer.ggml.{gguf_name}_token_id"] = found
    eos = keys.get("tokenizer.ggml.eos_token_id")
    texts = vocabulary.by_id
    unknown = [end for end in ends if end != eos and texts.get(end) not in END_OF_GENERATION]
    for name, end in zip(("eot", "eom"), unknown, strict=False):
        keys[f"tokenizer.ggml.{name}_token_id"] = end
    for name, place in (("bos", 0), ("eos", -1)):
        added = _added_by_template(whole, place)
        found = config.flag(f"add_{name}_token", added == keys.get(f"tokenizer.ggml.{name}_token_id", ""))
        keys[f"tokenizer.ggml.add_{name}_token"] = found and f"tokenizer.ggml.{name}_token_id" in keys
    return keys


def _named(config: Fields, key: str, vocabulary: HFVocabulary) -> int | None:
    """The id of the token that tokenizer_config.json names; None where it names none that exists."""
    value = config.get(key)
    text = value.get("content") if isinstance(value, Mapping) else value
    if text is None:
        return None
    if not isinstance(text, str):
        raise config.error(key, "is no text")
    if (found := vocabulary.ids.get(text)) is None and key in ("bos_token", "eos_token"):
        raise config.error(key, f"is {shown(text)!r}, which tokenizer.json does not have")
    return found


def _ids(fields: Fields, key: str, vocabulary: HFVocabulary) -> list[int]:
    """One id or several."""
    value = fields.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for each in ids[:100]:
        if type(each) is not int or each not in vocabulary.by_id:
            raise fields.error(
                key, f"is {shown(str(value))}; the vocabulary has {len(vocabulary.by_id):,} tokens"
            )
    return ids[:100]


def _added_by_template(whole: Fields, place: int) -> int | None:
    """The id that tokenizer.json's post-processor puts first (0) or last (-1)."""
    processor = whole.section("post_processor")
    if processor is None:
        return None
    steps = [processor, *processor.objects("processors")]
    for step in steps:
        if step.get("type") != "TemplateProcessing":
            continue
        single, known = step.objects("single"), step.section("special_tokens")
        token = single[place].section("SpecialToken") if single else None
        if token is None or known is None or (entry := known.section(token.text("id"))) is None:
            return None
        ids = entry.get("ids")
        return ids[0] if isinstance(ids, list) and len(ids) == 1 and type(ids[0]) is int else None
    return None


def _templates(folder: HFFolder, config: Fields) -> dict[str, Any]:
    """The chat template, and those that have names."""
    found: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, list):
        found = {each.text("name"): each.text("template") for each in config.objects("chat_template")}
    elif value is not None:
        found["default"] = config.text("chat_template")
    if (path := folder.path / "chat_template.json").exists():
        found["default"] = read_object(path).text("chat_template")
    if (path := folder.path / "chat_template.jinja").exists():
        found["default"] = read_text(path)
    for name, text in found.items():
        if len(text) > MAX_TEMPLATE or not name.isidentifier() or "\0" in text:
            raise ModelFileError(
                f"{config.source}: chat_template {shown(name)!r} is no template of a usable size"
            )
    keys: dict[str, Any] = {f"tokenizer.chat_template.{k}": v for k, v in found.items() if k != "default"}
    if others := sorted(found.keys() - {"default"}):
        keys["tokenizer.chat_templates"] = others
    return keys | ({"tokenizer.chat_template": found["default"]} if "default" in found else {})
