"""PEFT's adapter_config.json: what of it changes the arithmetic, and which modules it is about.

The rules are those of peft's LoraConfig, check_target_module_exists and get_pattern_key.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.fitting import refuse, shown
from realm_jax.lora.patterns import Expression, match

MAX_BYTES = 4 << 20
ALL_LINEAR = "all-linear"
# What these say is about training, or about whoever saved the file. fan_in_fan_out tells how the base's own
# weight lies in memory; the adapter's does not depend on it.
WITHOUT_EFFECT = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config"}
WITHOUT_EFFECT |= {"fan_in_fan_out", "inference_mode", "lora_dropout", "megatron_core", "merge_weights"}
WITHOUT_EFFECT |= {"parent_library", "peft_version", "qalora_group_size", "revision", "runtime_config"}
WITHOUT_EFFECT |= {"task_type", "unsloth_fixed", "velora_config"}
USED = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "bias"}
USED |= {"target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"}
USED |= {"init_lora_weights"}
KEEPS_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class PeftConfig:
    """The fields that matter, checked."""

    source: str
    rank: int
    alpha: float
    rank_stabilized: bool
    dora: bool
    bias: str
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    modules_to_save: tuple[str, ...]
    layers: tuple[int, ...] | None
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Each module's rank and the scale of its product."""
        ranks = self._by_pattern(self.ranks, modules, self.rank)
        alphas = self._by_pattern(self.alphas, modules, self.alpha)
        return {
            name: (rank, alphas[name] / (math.sqrt(rank) if self.rank_stabilized else rank))
            for name, rank in ranks.items()
        }

    def _by_pattern(self, values: Mapping[str, Any], modules: Sequence[str], default: Any) -> dict[str, Any]:
        """For each module the value of the first pattern that its name ends with."""
        matched = match([Expression(rf"(.*\.)?({key})$", False) for key in values], modules, self.source)
        found = dict.fromkeys(modules, default)
        for names, value in reversed(list(zip(matched, values.values(), strict=True))):
            found |= dict.fromkeys(names, value)
        return found

    def targets(self, modules: Sequence[str], linear: Sequence[str]) -> set[str]:
        """Which of the modules have a low-rank change; all of them where the file does not say.

        linear: those that "all-linear" means.
        """
        wanted = self.target_modules
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            found = set(linear)
        else:
            found = set(modules) if wanted is None else self._named(wanted, modules)
        if self.layers is not None and not isinstance(wanted, str | None):
            found = {name for name in found if layer_of(name) in self.layers}
        excluded = self._named(self.exclude_modules, modules) if self.exclude_modules else set()
        return found - excluded - {name for name in modules if self.saves(name)}

    def _named(self, wanted: str | Sequence[str], modules: Sequence[str]) -> set[str]:
        if isinstance(wanted, str):
            return match([Expression(wanted, True)], modules, self.source)[0]
        return {name for name in modules if any(ends_with(name, end) for end in wanted)}

    def saves(self, module: str) -> bool:
        """Whether the file brings the module whole."""
        return any(module.endswith(name) for name in self.modules_to_save)


def ends_with(module: str, name: str) -> bool:
    """Whether a name in a list means this module."""
    return module == name or module.endswith(f".{name}")


def layer_of(module: str) -> int | None:
    """The number after the first word of the name that has one."""
    found = re.match(r".*?\.[^.]*\.(\d+)\.", module)
    return int(found[1]) if found else None


def read_config(path: Path) -> PeftConfig:
    """The configuration beside an adapter.

    Raises ModelFileError for a wrong value, UnsupportedError for one that asks for other arithmetic.
    """
    fields = Fields(path.name, _object(path))
    if (kind := fields.values.get("peft_type", "LORA")) != "LORA":
        raise UnsupportedError(f"{path.name}: peft_type is {shown(str(kind))}; LORA is supported")
    unknown = {
        key: value for key, value in fields.values.items() if key not in USED | WITHOUT_EFFECT and value
    }
    if unknown:
        named = [f"{shown(key)} = {shown(str(value))[:40]}" for key, value in unknown.items()]
        refuse(path.name, "not supported (merge the adapter where it was trained)", named, UnsupportedError)
    if (start := fields.values.get("init_lora_weights")) not in KEEPS_THE_BASE:
        raise UnsupportedError(
            f"{path.name}: init_lora_weights is {shown(str(start))}, which changes the base model (save the "
            "adapter with path_initial_model_for_weight_conversion)"
        )
    if (pattern := fields.values.get("layers_pattern")) not in (None, [], "", "layers", ["layers"]):
        raise UnsupportedError(f"{path.name}: layers_pattern is {shown(str(pattern))}; layers is supported")
    return PeftConfig(
        source=path.name,
        rank=fields.count("r", fields.values.get("r", 8)),
        alpha=fields.real("lora_alpha", fields.values.get("lora_alpha", 8)),
        rank_stabilized=fields.flag("use_rslora"),
        dora=fields.flag("use_dora"),
        bias=fields.choice("bias", ("none", "all", "lora_only")),
        target_modules=fields.names("target_modules"),
        exclude_modules=fields.names("exclude_modules"),
        modules_to_save=fields.list_of_names("modules_to_save"),
        layers=fields.layers("layers_to_transform"),
        ranks=fields.pattern("rank_pattern", fields.count),
        alphas=fields.pattern("alpha_pattern", fields.real),
    )


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in the file."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    try:
        if path.stat().st_size > MAX_BYTES:
            raise ModelFileError(f"{path.name}: the file has more than {MAX_BYTES >> 20} MiB")
        values = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise ModelFileError(
            f"{path.name}: no such file beside the adapter (it holds the rank and alpha)"
        ) from None
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path.name}: no JSON: {shown(str(error))}") from None
    if not isinstance(values, dict):
        raise ModelFileError(f"{path.name}: holds no JSON object")
    return values


@dataclass(frozen=True)
class Fields:
    """The object's values, each checked as it is taken."""

    source: str
    values: dict[str, Any]

    def wrong(self, key: str, value: object, expected: str) -> ModelFileError:
        return ModelFileError(f"{self.source}: {shown(key)} is {shown(str(value))}; it must be {expected}")

    def count(self, key: str, value: object) -> int:
        if type(value) is not int or not 1 <= value < 1 << 31:
            raise self.wrong(key, value, "a whole number from 1")
        return value

    def real(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.wrong(key, value, "a finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.values.get(key) or False
        if not isinstance(value, bool):
            raise self.wrong(key, value, "true or false")
        return value

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        value = self.values.get(key, allowed[0])
        if value not in allowed:
            raise self.wrong(key, value, f"one of {', '.join(allowed)}")
        return value

    def names(self, key: str) -> str | tuple[str, ...] | None:
        """An expression, a list of names, or nothing."""
        value = self.values.get(key)
        return value if isinstance(value, str | None) else self.list_of_names(key)

    def list_of_names(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            raise self.wrong(key, value, "a list of names")
        return tuple(value)

    def layers(self, key: str) -> tuple[int, ...] | None:
        value = self.values.get(key)
        layers = [value] if isinstance(value, int) else value
        if layers in (None, []):
            return None
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise self.wrong(key, value, "a list of layer numbers")
        return tuple(layers)

    def pattern(self, key: str, checked: Any) -> dict[str, Any]:
        value = self.values.get(key) or {}
        if not isinstance(value, dict):
            raise self.wrong(key, value, "an object")
        return {name: checked(f"{key}.{name}", each) for name, each in value.items()}
