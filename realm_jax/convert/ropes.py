"""How a model turns positions, from config.json's words into GGUF's.

Both forms are read: `rope_parameters` of transformers 5, and `rope_theta` beside `rope_scaling` of 4.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from realm_jax.convert.families import Family
from realm_jax.convert.fields import Fields
from realm_jax.errors import UnsupportedError

OLD_NAMES = {"su": "longrope", None: "default"}
MAX_CONTEXT = 1 << 28


@dataclass(frozen=True)
class Ropes:
    """What GGUF says of them: keys without the architecture's name, and tensors of factors."""

    keys: dict[str, Any]
    tensors: Mapping[str, np.ndarray]


def ropes(facts: Fields, family: Family, head_dim: int) -> Ropes:
    """Raises UnsupportedError for a scaling that GGUF has no word for, ModelFileError for broken values."""
    full, local = _parameters(facts)
    kind = full.get("rope_type") or full.get("type")
    kind = OLD_NAMES.get(kind, kind) if isinstance(kind, str | None) else kind
    if kind not in family.rope_types:
        raise UnsupportedError(
            f"{full.source}: rope_type is {ascii(kind)[:60]}; "
            f"converted for {family.architecture} are {', '.join(family.rope_types)}"
        )
    dims = _dims(facts, full, family, head_dim)
    base = full.real("rope_theta")
    keys: dict[str, Any] = {"rope.dimension_count": dims, "rope.freq_base": base}
    if local is not None:
        keys["rope.freq_base_swa"] = local
    tensors: dict[str, np.ndarray] = {}
    match kind:
        case "linear":
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": full.real("factor")}
        case "yarn":
            keys |= _yarn(facts, full)
        case "llama3":
            tensors["rope_freqs.weight"] = _llama3(full, base, dims)
        case "longrope":
            keys |= _longrope(facts, full)
            for length in ("long", "short"):
                factors = np.array(full.reals(f"{length}_factor", dims // 2), np.float32)
                tensors[f"rope_factors_{length}.weight"] = factors
    return Ropes(keys, tensors)


def _parameters(facts: Fields) -> tuple[Fields, float | None]:
    """What layers turn by that see all, and the base of windowed ones where that is another."""
    if (new := facts.section("rope_parameters")) is None:
        old = facts.section("rope_scaling") or Fields({}, f"{facts.source}: rope_scaling")
        base = {"rope_theta": facts.real("rope_theta")}
        local = facts.real("rope_local_base_freq") if facts.has("rope_local_base_freq") else None
        return Fields(base | {k: v for k, v in old.values.items() if v is not None}, old.source), local
    defaults = {"rope_theta": facts.get("rope_theta")}
    if (full := new.section("full_attention")) is None:
        return Fields(new.values, new.source, defaults), None
    full = Fields(full.values, full.source, defaults)
    if (local := new.section("sliding_attention")) is None:
        return full, None
    if (kind := local.get("rope_type") or "default") != "default":
        raise UnsupportedError(f"{local.source}: rope_type is {ascii(kind)[:60]}; only default is converted")
    return full, local.real("rope_theta", default=10000.0)


def _dims(facts: Fields, full: Fields, family: Family, head_dim: int) -> int:
    """The numbers of a head that turn."""
    part = (full if full.has("partial_rotary_factor") else facts).real("partial_rotary_factor", default=1.0)
    dims = int(head_dim * part)
    if part > 1 or (part < 1 and not family.partial_rope) or dims < 2 or dims % 2:
        raise UnsupportedError(
            f"{facts.source}: partial_rotary_factor is {part:g} of {head_dim}; converted for "
            f"{family.architecture} {'is an even share' if family.partial_rope else 'is 1'}"
        )
    return dims


def _original(facts: Fields, full: Fields) -> int:
    """The context that the model was first trained with."""
    name = "original_max_position_embeddings"
    return (full if full.has(name) else facts).count(
        name, MAX_CONTEXT, default=facts.count("max_position_embeddings", MAX_CONTEXT)
    )


def _yarn(facts: Fields, full: Fields) -> dict[str, Any]:
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (value := full.real(name, default=usual)) != usual:
            raise UnsupportedError(f"{full.source}: {name} is {value:g}; only {usual:g} is converted")
    if not full.flag("truncate", True):
        raise UnsupportedError(f"{full.source}: truncate is false; only true is converted")
    factor, original = full.real("factor"), _original(facts, full)
    implied = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    wanted = full.real("attention_factor", default=_mscaled(full, factor, implied))
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    keys["rope.scaling.original_context_length"] = original
    if wanted != implied:
        keys["rope.scaling.attn_factor"] = wanted / implied
    return keys


def _mscaled(full: Fields, factor: float, implied: float) -> float:
    """The magnitude that DeepSeek's two fields give, where both are there."""
    if not (full.get("mscale") and full.get("mscale_all_dim")) or factor <= 1:
        return implied
    one, other = (0.1 * full.real(name) * math.log(factor) + 1 for name in ("mscale", "mscale_all_dim"))
    return one / other


def _longrope(facts: Fields, full: Fields) -> dict[str, Any]:
    original = _original(facts, full)
    longest = facts.count("max_position_embeddings", MAX_CONTEXT)
    factor = full.real("factor", default=longest / original)
    implied = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {
        "rope.scaling.original_context_length": original,
        "rope.scaling.attn_factor": full.real("attention_factor", default=implied),
    }


def _llama3(full: Fields, base: float, dims: int) -> np.ndarray:
    """What frequencies are divided by: 1 for short waves, the factor for long ones, between them a blend."""
    factor = full.real("factor")
    original = full.count("original_max_position_embeddings", MAX_CONTEXT)
    low, high = full.real("low_freq_factor", default=1.0), full.real("high_freq_factor", default=4.0)
    if high <= low:
        raise full.error("high_freq_factor", f"is {high:g}; it must be above low_freq_factor, {low:g}")
    waves = 2 * np.pi * np.float64(base) ** (np.arange(0, dims, 2) / dims)
    blend = np.clip((original / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - blend) / factor + blend)).astype(np.float32)
