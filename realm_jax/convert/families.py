"""The families of models that are converted: what transformers' classes say where config.json is silent.

The numbers are the defaults of transformers 5.23's configuration classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from realm_jax.convert.fields import Fields
from realm_jax.errors import UnsupportedError

SILU, GELU = ("hidden_act", ("silu",)), ("hidden_activation", ("gelu_pytorch_tanh",))
_USUAL = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 32000}
_GEMMA = _USUAL | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Family:
    """A family. classes: the names in config.json's `architectures`; models: in its `model_type`.

    rope_types: how its positions may be scaled so that GGUF can say it. partial_rope: whether only a part of
    each head may turn.
    """

    architecture: str
    classes: tuple[str, ...]
    models: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=lambda: _USUAL)
    activation: tuple[str, tuple[str, ...]] = SILU
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    partial_rope: bool = False


FAMILIES = (
    Family(
        "llama",
        ("LlamaForCausalLM",),
        ("llama",),
        _USUAL | {"max_position_embeddings": 2048},
        rope_types=("default", "linear", "yarn", "llama3"),
    ),
    Family(
        "llama",
        ("MistralForCausalLM",),
        ("mistral",),
        _USUAL | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        rope_types=("default", "linear", "yarn", "llama3"),
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), ("qwen2",), _USUAL | {"max_position_embeddings": 32768}),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        ("qwen3",),
        _USUAL | {"max_position_embeddings": 32768, "head_dim": 128},
    ),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        ("gemma2",),
        _GEMMA | {"max_position_embeddings": 8192, "vocab_size": 256000}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        GELU,
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        ("gemma3_text", "gemma3"),
        _GEMMA | {"max_position_embeddings": 131072, "vocab_size": 262208}
        | {"rope_theta": 1e6, "rope_local_base_freq": 10000.0},
        GELU,
    ),
    Family(
        "phi3",
        ("Phi3ForCausalLM",),
        ("phi3",),
        _USUAL | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
        rope_types=("default", "longrope"),
        partial_rope=True,
    ),
)  # fmt: skip


def family_of(config: Fields) -> Family:
    """The family that config.json names. Raises UnsupportedError that lists those that are known."""
    classes, model = config.texts("architectures"), config.text("model_type", "")
    for family in FAMILIES:
        if (classes and classes[0] in family.classes) or (not classes and model in family.models):
            return family
    said = f"architectures is {classes[:3]!a}" if classes else f"model_type is {model[:60]!a}"
    known = ", ".join(name for family in FAMILIES for name in family.classes)
    raise UnsupportedError(f"{config.source}: {said}; converted are {known}")


def facts_of(config: Fields, family: Family) -> Fields:
    """The language model's own values, with the family's defaults."""
    within = config.section("text_config") if family.architecture == "gemma3" else None
    own = config if within is None else within
    return Fields(own.values, own.source, family.defaults)
