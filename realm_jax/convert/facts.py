"""config.json's facts of a model as GGUF's keys; and whether the file says the same as config.json."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from realm_jax.config import ModelConfig
from realm_jax.convert.families import Family
from realm_jax.convert.fields import Fields
from realm_jax.convert.ropes import MAX_CONTEXT, Ropes, ropes
from realm_jax.errors import UnsupportedError

MOST_HEADS, WIDEST, DEEPEST, MOST_TOKENS = 1 << 14, 1 << 20, 1 << 12, 1 << 20


@dataclass(frozen=True)
class Facts:
    """keys: of GGUF's metadata, with the architecture's name. ropes: see there."""

    keys: dict[str, Any]
    ropes: Ropes
    is_tied: bool


def read_facts(fields: Fields, family: Family) -> Facts:
    """Raises UnsupportedError for what GGUF cannot say of the family, ModelFileError for broken values."""
    heads = fields.count("num_attention_heads", MOST_HEADS)
    hidden = fields.count("hidden_size", WIDEST)
    head_dim = fields.count("head_dim", MOST_HEADS, default=max(1, hidden // heads))
    turns = ropes(fields, family, head_dim)
    _check_activation(fields, family)
    keys = {
        "block_count": fields.count("num_hidden_layers", DEEPEST),
        "context_length": fields.count("max_position_embeddings", MAX_CONTEXT),
        "embedding_length": hidden,
        "feed_forward_length": fields.count("intermediate_size", 1 << 22),
        "attention.head_count": heads,
        "attention.head_count_kv": fields.count("num_key_value_heads", heads, default=heads),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": fields.real("rms_norm_eps"),
        "vocab_size": fields.count("vocab_size", MOST_TOKENS),
        **turns.keys,
        **dict(_gemma(fields, family)),
    }
    named = {f"{family.architecture}.{key}": value for key, value in keys.items()}
    return Facts(named, turns, fields.flag("tie_word_embeddings", False))


def _check_activation(fields: Fields, family: Family) -> None:
    key, known = family.activation
    value = fields.get(key)
    if value is not None and value not in known:
        raise UnsupportedError(f"{fields.source}: {key} is {ascii(value)[:60]}; converted is {known[0]}")


def _gemma(fields: Fields, family: Family) -> Iterator[tuple[str, Any]]:
    if not family.architecture.startswith("gemma"):
        return
    yield "attention.sliding_window", fields.count("sliding_window", MAX_CONTEXT)
    if fields.get("use_bidirectional_attention"):
        raise UnsupportedError(f"{fields.source}: use_bidirectional_attention is true; GGUF cannot say that")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        cap = fields.values.get(name, fields.defaults.get(name))  # null = none, not the default
        if (cap is not None) != (family.architecture == "gemma2"):
            raise UnsupportedError(
                f"{fields.source}: {name} is {'null' if cap is None else cap}; readers of GGUF's "
                f"{family.architecture} take {'one' if cap is None else 'none'}"
            )
        if cap is not None:
            yield name, fields.real(name)


def check_scale(fields: Fields, config: ModelConfig) -> None:
    """What readers of the file scale attention by is what config.json says."""
    if not config.architecture.startswith("gemma"):
        return
    wanted = fields.real("query_pre_attn_scalar")
    if abs(config.attention_scale * wanted**0.5 - 1) > 1e-6:
        raise UnsupportedError(
            f"{fields.source}: query_pre_attn_scalar is {wanted:g}; GGUF's {config.architecture} with "
            f"{config.num_layers} layers means {config.attention_scale**-2:g}"
        )


def windows_lost(fields: Fields, config: ModelConfig) -> str | None:
    """A warning where the model has windows and GGUF's architecture has none; None where all is said.

    Raises UnsupportedError where both have windows, and in different layers.
    """
    wanted = list(_windows(fields, config.num_layers, config.architecture))
    given = [kind.window for kind in config.layers]
    if wanted == given:
        return None
    if any(given):
        raise UnsupportedError(
            f"{fields.source}: layer_types has its windows elsewhere than every GGUF file of "
            f"{config.architecture}"
        )
    narrowest = min(window for window in wanted if window is not None)
    if narrowest >= config.context_length:
        return None
    return (
        f"the model looks back {narrowest:,} tokens and GGUF's {config.architecture} cannot say so: beyond "
        f"that its answers differ (keep -c at {narrowest})"
    )


def _windows(fields: Fields, layers: int, architecture: str) -> Iterator[int | None]:
    """Each layer's window as transformers takes it."""
    window = None
    if fields.has("sliding_window") and fields.flag("use_sliding_window", True):
        window = fields.count("sliding_window", MAX_CONTEXT)
    types = fields.texts("layer_types")
    if types and len(types) != layers:
        raise fields.error("layer_types", f"has {len(types)} entries for {layers} layers")
    if types:
        yield from (window if kind == "sliding_attention" else None for kind in types)
        return
    period = {"gemma2": 2, "gemma3": 6}.get(architecture, 0)
    if period:
        key = "sliding_window_pattern" if fields.has("sliding_window_pattern") else "_sliding_window_pattern"
        period = fields.count(key, 1 << 12, default=period)
    first = fields.count("max_window_layers", 1 << 12, least=0, default=0)  # of Qwen: full before it
    for i in range(layers):
        is_full = (i + 1) % period == 0 if period else architecture.startswith("qwen") and i < first
        yield None if is_full else window
