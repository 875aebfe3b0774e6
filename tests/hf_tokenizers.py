"""Tokenizers of Hugging Face's form, trained on a page of text, as the families' real files are built.

For `make_hf_golden`; it needs the tokenizers library alone, but asks transformers what each does.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's 1234 miles; we'll see what they've done, won't we?\n"
    "Les élèves français étudient à l'école. Größe, naïve, señor, Ελληνικά, русский язык, 日本語 텍스트.\n\n"
    "def main(args):\n    for item in range(100):\n\t\tprint(f'{item:>5}', end='\\n')\n    return 3.14159\n"
    "In the beginning there was the word, and the word was with them; there there, then the other thing.\n"
) * 8
HARD = [
    "Hello world",
    " leading and trailing ",
    "  two  spaces   three\n\n\n\tand\ttabs \r\n end",
    "It's I'LL we've they'RE 'd 'tis don't",
    "1 12 123 1234 12345 3.14159 1,000,000 ٣٤٥ ½",
    "café naïve Größe Ελληνικά русский 日本語 한국어 العربية हिन्दी",
    "emoji 👍🏽 👩‍👩‍👧‍👦 🇩🇪 and \u200b zero width",
    "def f(x):\n    return x**2  # !!!???...\n\n\n",
    "<tag attr='v'>&amp;</tag> [x](y) {z} a_b-c/d\\e @home #1 $5 50% ~^|",
    "\u00a0nbsp\u2003em\u3000ideographic",
    "a" * 50,
    "",
]
CHAT = [
    {"role": "user", "content": "Name a river."},
    {"role": "assistant", "content": "The Nile."},
    {"role": "user", "content": "Another?"},
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def _byte_level(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """As the files of Llama 3, Qwen2 and SmolLM are."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama3"))
    if name == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    else:
        split = pre_tokenizers.Split(Regex(LLAMA3 if name == "llama3" else QWEN2), "isolated")
        steps = [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    if name == "llama3":
        special = ["<|end_of_text|>", "<|begin_of_text|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = special if name == "smollm" else []  # elsewhere they stand behind the vocabulary
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=first, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_special_tokens(special)
    facts: dict[str, Any] = {"eos_token": special[2], "clean_up_tokenization_spaces": name == "llama3"}
    if name == "llama3":
        tokenizer.post_processor = _with_bos(tokenizer, "<|begin_of_text|>")
        facts["bos_token"] = "<|begin_of_text|>"
    if name == "qwen2":
        tokenizer.add_tokens(["<tool_call>"])  # a token that is text
        facts |= {"add_bos_token": False, "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"}}
    return tokenizer, facts | {"chat_template": CHATML}


def _sentence_piece(name: str) -> tuple[Tokenizer, dict[str, Any]]:
    """As the files of Llama 2, Gemma and Phi-3 are: every split of a token is a merge."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"] if name == "gemma" else ["<unk>", "<s>", "</s>"]
    vocabulary = _vocabulary(special)
    unk = "<unk>"
    tokenizer = Tokenizer(
        models.BPE(vocabulary, _merges(vocabulary), unk_token=unk, fuse_unk=True, byte_fallback=True)
    )
    replace = normalizers.Replace(" ", "▁")
    bos, eos = ("<bos>", "<eos>") if name == "gemma" else ("<s>", "</s>")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if name == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(special)
    if name == "gemma":
        tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    if name == "phi3":
        tokenizer.add_special_tokens([AddedToken("</s>", rstrip=True, special=True)])
        ends = ("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>")
        tokenizer.add_special_tokens([AddedToken(t, rstrip=t != "<|endoftext|>", special=True) for t in ends])
    tokenizer.post_processor = _with_bos(tokenizer, bos)
    facts = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "add_bos_token": True}
    template = PHI3 if name == "phi3" else INST
    return tokenizer, facts | {"add_eos_token": False, "chat_template": template}


def _vocabulary(special: list[str]) -> dict[str, int]:
    """Special tokens, bytes, then tokens by falling score: a training's merges, then single characters."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=180, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator([CORPUS], trainer)
    found = sorted(trained.get_vocab().items(), key=lambda each: each[1])
    pieces = [piece for piece, _ in found if len(piece) > 1] + [
        piece for piece, _ in found if len(piece) == 1
    ]
    texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {text: i for i, text in enumerate(texts)}


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """As transformers makes them of a SentencePiece model: token by token, every way to split it."""
    found = []
    for piece in vocabulary:
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        ways = [way for way in ways if way[0] in vocabulary and way[1] in vocabulary]
        found += sorted(ways, key=lambda way: (vocabulary[way[0]], vocabulary[way[1]]))
    return found


def _with_bos(tokenizer: Tokenizer, bos: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


def write_all(root: Path, transformers: Any) -> dict[str, int]:
    """Each tokenizer's folder, with `expected.json`; how many tokens each has."""
    sizes = {}
    for name in ("llama2", "llama3", "smollm", "qwen2", "gemma", "phi3"):
        build = _sentence_piece if name in ("llama2", "gemma", "phi3") else _byte_level
        tokenizer, facts = build(name)
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(
            json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
        )
        (folder / "tokenizer_config.json").write_text(json.dumps(facts, indent=1))
        texts = {key: value for key, value in facts.items() if key.endswith("_token")}
        theirs = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"),
            **{key: value["content"] if isinstance(value, dict) else value for key, value in texts.items()
               if isinstance(value, str | dict)},
        )  # fmt: skip
        chat = theirs.apply_chat_template(
            CHAT, chat_template=facts["chat_template"], tokenize=False, add_generation_prompt=True
        )
        expected = {
            "texts": {text: tokenizer.encode(text).ids for text in HARD},
            "chat": chat,
            "chat_ids": tokenizer.encode(chat, add_special_tokens=False).ids,
        }
        (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False))
        sizes[name] = tokenizer.get_vocab_size()
    return sizes
