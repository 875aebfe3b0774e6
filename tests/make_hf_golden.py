"""Golden folders of Hugging Face's form: tiny random models, and what transformers computes with them.

Run by hand, in an environment of its own; the project itself never imports torch or transformers:

    python -m venv golden && golden/bin/pip install torch transformers
    golden/bin/python tests/make_hf_golden.py tests/golden/hf

Made with torch 2.13.0 and transformers 5.23.0. Each model has a folder; its tokenizer's files lie in
`tokenizers/NAME`; `expected.npz` has tokens and the float32 logits of the last of them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import hf_tokenizers  # pyright: ignore[reportMissingImports]: beside this file
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]

TOKENS, SHOWN = 40, 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
OLD = ("rope_theta", "rope_scaling")  # as configs say it that transformers 4 wrote
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.5, 2.0, 4.0, 7.0],
}

# name -> (transformers' class, tokenizer, what differs from SIZES, rope as transformers 4 wrote it)
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("Llama", "llama2", {"head_dim": 12, "vocab_size": 0}, None),
    "llama-llama3": (
        "Llama",
        "llama3",
        {"tie_word_embeddings": True},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "llama-linear-biased": (
        "Llama",
        "smollm",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
        },
        None,
    ),
    "mistral": ("Mistral", "llama2", {"sliding_window": 4096}, {"rope_theta": 1000000.0}),
    "qwen2": ("Qwen2", "qwen2", {"head_dim": None}, {"rope_theta": 1000000.0, "rope_scaling": YARN}),
    "qwen3": ("Qwen3", "qwen2", {"tie_word_embeddings": True, "padding": 7}, None),
    "gemma2": ("Gemma2", "gemma", {"sliding_window": 8, "query_pre_attn_scalar": 8}, None),
    "gemma3": (
        "Gemma3",
        "gemma",
        {
            "num_hidden_layers": 7,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        None,
    ),
    "phi3": ("Phi3", "phi3", {"head_dim": None, "tie_word_embeddings": False}, {"rope_theta": 10000.0}),
    "phi3-longrope": (
        "Phi3",
        "phi3",
        {"head_dim": None, "original_max_position_embeddings": 48},
        {"rope_theta": 10000.0, "rope_scaling": LONGROPE},
    ),
}


def main(root: Path) -> None:
    sizes = hf_tokenizers.write_all(root / "tokenizers", transformers)
    for seed, name in enumerate(MODELS):
        write(root / name, seed, sizes, *MODELS[name])


def write(
    folder: Path,
    seed: int,
    sizes: dict[str, int],
    family: str,
    tokenizer: str,
    changes: dict[str, Any],
    old_rope: dict[str, Any] | None,
) -> None:
    """The model's folder, and what it computes as transformers loads it from there."""
    changes = dict(changes)
    facts = SIZES | {"vocab_size": sizes[tokenizer] + changes.pop("padding", 0)} | changes
    facts = {key: value for key, value in facts.items() if value is not None}
    facts["vocab_size"] = facts["vocab_size"] or sizes[tokenizer]
    if old_rope is not None and "rope_scaling" not in old_rope:
        facts["rope_parameters"] = {"rope_type": "default", **old_rope}
    for name, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        facts[f"{name}_token_id"] = token
    config = _class(family, "Config", "TextConfig")(**facts)
    model = _class(family, "ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for values in model.parameters():
            scale = 0.3 if values.ndim > 1 else 0.2
            noise = torch.randn(values.shape, generator=generator) * scale + values * (values.ndim == 1)
            values.copy_(noise.bfloat16().float())
    folder.mkdir(parents=True, exist_ok=True)
    sharded = {"max_shard_size": "40KB"} if folder.name == "qwen3" else {}
    model.bfloat16().save_pretrained(folder, **sharded)
    said = json.loads((folder / "config.json").read_text())
    if old_rope is not None:
        del said["rope_parameters"]
        said |= {"rope_scaling": None} | old_rope | {"torch_dtype": said.pop("dtype")}
    (folder / "config.json").write_text(json.dumps(said | {"tokenizer_golden": tokenizer}, indent=1))
    expect(folder, family, seed)


def expect(folder: Path, family: str, seed: int) -> None:
    """`expected.npz` has what transformers computes; `short_` where the text is shorter than longrope's."""
    kind = _class(family, "ForCausalLM")
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = np.random.default_rng(seed).integers(3, 300, 2 * TOKENS)
    found = {}
    lengths = {"": 2 * TOKENS, "short_": TOKENS} if "longrope" in folder.name else {"": TOKENS}
    for prefix, length in lengths.items():
        with torch.no_grad():
            logits = model(torch.tensor(tokens[None, :length])).logits[0, -SHOWN:]
        found |= {f"{prefix}tokens": tokens[:length], f"{prefix}logits": logits.numpy()}
    np.savez_compressed(folder / "expected.npz", **found)
    print(folder.name, float(np.abs(found["logits"]).max()))


def _class(family: str, *endings: str) -> Any:
    return next(
        found for ending in reversed(endings) if (found := getattr(transformers, family + ending, None))
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
