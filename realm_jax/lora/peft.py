"""Adapters as PEFT saves them: adapter_config.json beside adapter_model.safetensors.

Nothing is unpickled, and a file decides nothing about time or memory before it is held against the base.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from realm_jax.errors import UnsupportedError
from realm_jax.lora.adapter import Adapter, Base, LowRank
from realm_jax.lora.assembly import Assembly
from realm_jax.lora.fitting import check_finite, misfits, refuse, refuse_tied, shown
from realm_jax.lora.modules import EMBEDDING, EXPERTS, FUSED, HEAD, Layout
from realm_jax.lora.peft_config import PeftConfig, read_config
from realm_jax.lora.safetensors_file import SafetensorsFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ROOT = "base_model.model."
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
TOPS = ("layers.", "embed_tokens", "norm", "lm_head")
KINDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "A",
    ".lora_embedding_B": "B",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora_B.bias": "lora_bias",
    ".base_layer.weight": "base",  # a copy of what the base has
    ".base_layer.bias": "bias",
    ".modules_to_save.weight": "weight",
    ".modules_to_save.bias": "bias",
    ".weight": "weight",
    ".bias": "bias",
}


@dataclass
class Module:
    """What the file has for one module of the base: kinds of tensors, by their names in the file."""

    key: str  # as PEFT calls it, for the expressions of the configuration
    tensors: dict[str, str] = field(default_factory=dict)

    @property
    def is_paired(self) -> bool:
        return bool(self.tensors.keys() & {"A", "B"})


def read_peft(weights: Path, base: Base) -> Adapter:
    """The adapter in a safetensors file and the configuration beside it, which fits the base.

    Raises ModelFileError with every tensor that does not fit, UnsupportedError for other arithmetic.
    """
    config = read_config(weights.parent / CONFIG)
    file = SafetensorsFile(weights)
    layout = Layout(base)
    modules = _modules(file, layout)
    paired = {name: module for name, module in modules.items() if module.is_paired}
    scales = config.scales([module.key for module in paired.values()])
    problems: list[str] = []
    for name, module in modules.items():
        problems += _misshapen(file, config, name, module, layout, scales.get(module.key))
    problems += _misplaced(config, modules, layout)
    if problems:
        refuse(weights.name, f"tensors do not fit {config.source} and {base.source}", problems)
    if EMBEDDING in paired:
        refuse_tied(weights.name, ["token_embd.weight"], base)
    values = {name: file.values(name) for name in _used(modules)}
    check_finite(weights.name, values)
    return _assembled(
        weights, modules, layout, values, {name: scales[m.key][1] for name, m in paired.items()}
    )


def _modules(file: SafetensorsFile, layout: Layout) -> dict[str, Module]:
    """The file's tensors by module; raises one error that names those which belong to none of the base."""
    modules: dict[str, Module] = {}
    unknown: list[str] = []
    for name in file.entries:
        module, key, kind = parsed_name(name)
        if any(part in key for part in EXPERTS):
            raise UnsupportedError(
                f"{file.path.name}: {shown(name)}: adapters of expert matrices are not supported "
                "(merge the adapter where it was trained)"
            )
        if kind == "lora_bias":
            raise UnsupportedError(f"{file.path.name}: {shown(name)}: lora_bias is not supported")
        is_known = bool(layout.rows(module)) if len(module) < 200 else False
        is_head = module == HEAD and "token_embd.weight" in layout.base.shapes
        found = modules.setdefault(module, Module(key)) if is_known or is_head else None
        if found is None or not kind:
            unknown.append(f"{shown(name)} belongs to no tensor of the model")
        elif found.tensors.setdefault(kind, name) != name:
            unknown.append(f"{shown(name)} is {shown(found.tensors[kind])} again")
    if unknown:
        refuse(file.path.name, f"tensors do not fit {layout.base.source}", unknown)
    if not modules:
        refuse(file.path.name, "the adapter changes nothing", ["it has no tensors"])
    return modules


def parsed_name(name: str) -> tuple[str, str, str]:
    """The module that a tensor belongs to, as the layout names it and as PEFT does, and what it is there."""
    rest = name.removeprefix(ROOT).replace(".default.", ".").removesuffix(".default")
    suffix = next((suffix for suffix in KINDS if rest.endswith(suffix)), "")
    key = rest.removesuffix(suffix)
    for prefix in PREFIXES:
        inner = key.removeprefix(prefix)
        if key.startswith(prefix) and inner.startswith(TOPS):
            return (inner if inner == HEAD else f"model.{inner}"), key, KINDS.get(suffix, "")
    return key, key, KINDS.get(suffix, "")


def _misplaced(config: PeftConfig, modules: Mapping[str, Module], layout: Layout) -> Iterator[str]:
    """Modules that the configuration names and the file lacks, and the other way round."""
    keys = [module.key for name, module in modules.items() if name.startswith("model.layers.")]
    prefix = keys[0].partition("layers.")[0] if keys else "model."
    parts = {name.partition("layers.")[2].partition(".")[2] for name in modules}
    fused = [
        whole
        for whole, pieces in FUSED.items()
        if whole in parts or (whole in layout.fused() and not parts & set(pieces))
    ]

    def key_of(module: str) -> str:
        known = modules.get(module)
        return known.key if known else module.replace("model.", prefix, 1)

    linear = [key_of(name) for name in layout.linear(fused=fused)]
    all_keys = dict.fromkeys([*linear, key_of(EMBEDDING), key_of(HEAD), *(m.key for m in modules.values())])
    paired = {module.key for module in modules.values() if module.is_paired}
    whole = {module.key for module in modules.values() if "weight" in module.tensors}
    targets = config.targets(list(all_keys), linear)
    norms = [key_of(name) for name in layout.norms()]
    saved = {key for key in [*all_keys, *norms] if config.saves(key)}
    for found, wanted, what in ((paired, targets, "target_modules"), (whole, saved, "modules_to_save")):
        yield from (f"{shown(key)} has no tensors, but is in {what}" for key in sorted(wanted - found))
        yield from (f"{shown(key)} has tensors, but is not in {what}" for key in sorted(found - wanted))
    if config.bias == "none":
        yield from (
            f"{shown(m.key)} has a bias, but bias is none" for m in modules.values() if "bias" in m.tensors
        )


def _misshapen(
    file: SafetensorsFile,
    config: PeftConfig,
    name: str,
    module: Module,
    layout: Layout,
    scale: tuple[int, float] | None,
) -> Iterator[str]:
    """What is wrong with the shapes of a module's tensors."""
    shape = layout.shape(name) or layout.shape(EMBEDDING)  # a tied head has that of the embedding
    assert shape is not None
    shapes = {kind: file.entries[tensor].shape for kind, tensor in module.tensors.items()}
    wanted = {"magnitude": shape[:1], "weight": shape, "base": shape, "bias": shape[:1]}
    for kind, expected in wanted.items():
        if kind in shapes and shapes[kind] != expected:
            yield f"{shown(module.tensors[kind])} is {list(shapes[kind])}, expected {list(expected)}"
    if not module.is_paired or scale is None:
        if "magnitude" in shapes:
            yield f"{shown(module.key)}: a magnitude, but no A and B"
        return
    if name == HEAD and not layout.rows(HEAD):
        yield f"{shown(module.key)}: the model has no output.weight, as its head is tied to the embedding"
    if config.dora != ("magnitude" in shapes):
        yield f"{shown(module.key)}: use_dora is {str(config.dora).lower()}, which its tensors contradict"
    a, b = shapes.get("A", ()), shapes.get("B", ())
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        parts = f"A is {list(a) or 'missing'} and B {list(b) or 'missing'}"
        yield f"{shown(module.key)}: {parts}, which is no pair"
    elif a[0] != scale[0]:
        yield f"{shown(module.key)}: rank is {a[0]:,}; {config.source} says {scale[0]:,}"
    elif name == EMBEDDING:
        yield from misfits(module.key, a[1], b[0], a[0], shape)
    else:
        yield from misfits(module.key, b[0], a[1], a[0], shape)


def _used(modules: Mapping[str, Module]) -> Iterator[str]:
    """The names of the tensors whose values matter."""
    for module in modules.values():
        yield from (tensor for kind, tensor in module.tensors.items() if kind != "base")


def _assembled(
    weights: Path,
    modules: Mapping[str, Module],
    layout: Layout,
    values: Mapping[str, np.ndarray],
    scales: Mapping[str, float],
) -> Adapter:
    """The adapter in the order and under the names of the base."""
    assembly = Assembly(weights.name, layout)
    for name, module in modules.items():
        has = {kind: values[tensor] for kind, tensor in module.tensors.items() if kind != "base"}
        if module.is_paired:
            a, b = has["A"], has["B"]
            if name == EMBEDDING:
                a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
                if "magnitude" in has:
                    raise UnsupportedError(f"{weights.name}: use_dora of an embedding is not supported")
            assembly.add_delta(name, LowRank(a, b, scales[name]))
        if "magnitude" in has:
            assembly.add_magnitude(name, has["magnitude"])
        if "weight" in has:
            assembly.add_whole(name, ".weight", has["weight"] + np.float32(layout.offset(name)))
        if "bias" in has:
            assembly.add_whole(name, ".bias", has["bias"])
    return assembly.adapter(weights.resolve().parent.name)
