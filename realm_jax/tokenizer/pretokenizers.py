"""How byte-level BPE models cut text into words before merging. Data only.

`tokenizer.ggml.pre` names one of `PRETOKENIZERS`. Its expressions apply one after the other, each to the
pieces that the ones before left; what an expression does not match is a piece too. The expressions state
what llama.cpp does, in Oniguruma's syntax: where llama.cpp simplifies a model's own expression (it folds all
non-ASCII letters into one class), so do these, because its ids are the reference.
"""

from dataclasses import dataclass

_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + "|" + _WORD + r"|\p{N}{1,3}" + _SYMBOLS + _SPACES
_QWEN2 = _CONTRACTION + "|" + _WORD + r"|\p{N}" + _SYMBOLS + _SPACES

# A run of capitals, then a run of small letters; a letter that is not ASCII counts as both.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
_CASED = rf"{_LEAD}{_UPPER}*{_LOWER}+%s|{_LEAD}{_UPPER}+{_LOWER}*%s"
_SYMBOLS_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _SYMBOLS_SLASH + _SPACES
_GPT4O = _CASED % (f"{_CONTRACTION}?", f"{_CONTRACTION}?") + r"|\p{N}{1,3}" + _SYMBOLS_SLASH + _SPACES
_GPT4O_MARKS = _GPT4O.replace(r"[\p{L}&&", r"[\p{L}\p{M}&&")
_CASELESS = rf"{_LEAD}[\p{{L}}\p{{M}}]+{_CONTRACTION}?"

_ASCII_PUNCTUATION = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
_DEEPSEEK3_WORD = _ASCII_PUNCTUATION + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    _DEEPSEEK3_WORD + r"[\r\n]*" + _SPACES,
)
_CJK_KOREAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# Letters with case, as of the Unicode version that DeepSeek's tokenizer was made with.
_CASED_LETTERS = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    r"\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481"
    r"\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b"
    r"\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b"
    r"\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    r"\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    r"\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    r"\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    r"\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LETTERS = rf"\s?[{_CASED_LETTERS.encode().decode('unicode_escape')}]+"
_DEEPSEEK_PUNCTUATION = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_DIGITS_BY_THREE = "[0-9]{1,3}(?=(?:[0-9]{3})*(?![0-9A-Za-z_]))"
_QWEN35 = rf"{_CONTRACTION}|{_LEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{_SPACES}"
_BAILING = rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}{_SYMBOLS}|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTION}|{_LEAD}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b820-\U0002ebef"
    "\uf900-\ufaff\U0002f800-\U0002fa1f"
)
_KIMI = rf"[{_HAN}]+|{_LEAD}[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?|\p{{N}}{{1,3}}" + _SYMBOLS + _SPACES
_AFMOE_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_ASIAN = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)
_JAIS2_SPACES = r"|\s*[\r\n]+" + "".join(
    rf"|\s{{{n}}}(?!\S)" for n in ("512", "256", "128", "64", "32", "16", "8", "4", "1,2")
)


@dataclass(frozen=True)
class PreTokenizer:
    """The expressions, and what else llama.cpp ties to the name of a pre-tokenizer."""

    splits: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token as it stands is not merged from its characters
    add_bos: bool = False
    clean_spaces: bool = False  # decoding removes the space before punctuation
    spaces_as_symbol: bool = False  # raw UTF-8 with U+2581 for spaces, instead of GPT-2's byte letters


def _named(names: str, *splits: str, **facts: bool) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(splits, **facts))


PRETOKENIZERS: dict[str, PreTokenizer] = {
    **_named(
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", _LLAMA3,
        ignore_merges=True, add_bos=True, clean_spaces=True,
    ),
    **_named("glm4 chatglm-bpe dbrx smaug-bpe", _LLAMA3, clean_spaces=True),
    **_named("jais-2", _LLAMA3.removesuffix(_SPACES) + _JAIS2_SPACES + r"|\s", clean_spaces=True),
    **_named(
        "minicpm5", r"\p{N}{1,3}", _LLAMA3.replace("{1,3}", "+"), ignore_merges=True, clean_spaces=True
    ),
    **_named("default", r"[\p{P}$+<=>\^~|]+", _GPT2, r"\p{N}+", _THREE_DIGITS, clean_spaces=True),
    **_named("falcon", r"[\p{P}$+<=>\^~|`]+", _GPT2, _THREE_DIGITS, clean_spaces=True),
    **_named(
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en "
        "jina-v2-code roberta-bpe olmo mpt jais exaone4", _GPT2, clean_spaces=True,
    ),
    **_named("trillion granite-docling", _GPT2),
    **_named("starcoder refact codeshell exaone minerva-7b mellum2", r"\p{N}", _GPT2, clean_spaces=True),
    **_named("command-r smollm", r"\p{N}", _GPT2),
    **_named("qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan grok-2 solar-open", _QWEN2),
    **_named("stablelm2 megrez", _QWEN2, clean_spaces=True),
    **_named("laguna", r"[^\n]+|\n+", _QWEN2),
    **_named("ufakzeka", _QWEN2.removeprefix(_CONTRACTION + "|")),
    **_named("qwen35", _QWEN35),
    **_named("seed-coder", rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+{_SPACES}"),
    **_named("bailingmoe bailingmoe2 llada-moe", _BAILING),
    **_named("exaone-moe", _EXAONE_MOE, clean_spaces=True),
    **_named("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O),
    **_named("tekken", _TEKKEN, ignore_merges=True, add_bos=True),
    **_named("granite-embed-multi-97m", _GPT4O_MARKS, ignore_merges=True),
    **_named("tiny_aya cohere2moe", _DIGITS_BY_THREE, _CASELESS + r"|\p{N}{1,3}" + _SYMBOLS_SLASH + _SPACES),
    **_named("youtu", _YOUTU_ASIAN, _CASELESS + r"|\p{N}" + _SYMBOLS_SLASH + _SPACES, ignore_merges=True),
    **_named("kimi-k2", _KIMI),
    **_named("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", *_DEEPSEEK3),
    **_named("spark2_5", *_DEEPSEEK3[:2], _DEEPSEEK3_WORD + r"|[\r\n]|\s+(?!\S)|\s+", r"\p{N}"),
    **_named("deepseek-coder", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_KOREAN, r"\p{N}"),
    **_named(
        "deepseek-llm",
        r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _CJK_KOREAN, r"\p{N}+",
    ),
    # llama.cpp glues what stands before a number to the number's first group.
    **_named("afmoe", r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_ASIAN, _DEEPSEEK3[2]),
    **_named("bloom gpt3-finnish", _BLOOM, clean_spaces=True),
    **_named("poro-chat", _BLOOM),
    **_named("viking", _BLOOM, r"\p{N}"),
    **_named("superbpe", r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))"),
    **_named(
        "chameleon",
        "<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", r"\p{N}",
        r"[\p{P}!-/:-@\[-`{-~]", _GPT2, add_bos=True,
    ),
    **_named(
        "gemma4 granite-embed-multi-311m", r"[^\n]+|\n+",
        add_bos=True, clean_spaces=True, spaces_as_symbol=True,
    ),
    **_named("sarvam-moe", r"[^\n]+|\n+", spaces_as_symbol=True),
}  # fmt: skip
