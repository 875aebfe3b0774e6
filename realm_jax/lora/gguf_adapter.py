"""Adapters as GGUF files, as llama.cpp's convert_lora_to_gguf.py writes and llama-adapter.cpp reads them.

Each changed tensor has a pair, NAME.lora_a [R, I] and NAME.lora_b [O, R]; that of the embedding, which is
read by rows, has the token's side in lora_a [V, R] and the other one in lora_b [D, R]. The scale of a pair
is adapter.lora.alpha / R, and 1 where alpha is 0 or absent. Norms stand whole under their own names; unlike
llama.cpp, which skips them, we use them.
"""

import math
from pathlib import Path

import numpy as np

from realm_jax import gguf
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile
from realm_jax.lora.adapter import Adapter, Base, LowRank
from realm_jax.lora.fitting import (
    Change,
    check_architecture,
    check_changes,
    check_finite,
    refuse,
    shown,
)
from realm_jax.quant import dequantize

ALPHA, KIND = "adapter.lora.alpha", "adapter.type"
INVOCATION = "adapter.alora.invocation_tokens"
EMBEDDING = "token_embd.weight"
A, B = ".lora_a", ".lora_b"
INTEGERS = (GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64)


def read_gguf(path: Path, base: Base) -> Adapter:
    """The adapter in a GGUF file, which fits the base.

    Raises ModelFileError with every tensor that does not fit, UnsupportedError for another kind of adapter.
    """
    with gguf.open(path) as file:
        alpha = alpha_of(file)
        check_architecture(path.name, file.metadata.get("general.architecture"), base)
        targets = _targets(file)
        norms = [name for name in file.tensors if name.endswith("_norm.weight")]
        changes = [_change_of(file, target) for target in targets]
        _check_norms(file, norms, base)
        check_changes(path.name, changes, base)
        deltas = {target: _delta(file, target, alpha) for target in targets}
        replaced = {name: _values(file, name) for name in norms}
    check_finite(path.name, replaced)
    return Adapter(path.stem, deltas, replaced)


def alpha_of(file: GGUFFile) -> float:
    """The file's alpha; its metadata says that it is a LoRA adapter."""
    meta, source = file.metadata, file.path.name
    if (kind := meta.get("general.type")) != "adapter":
        raise ModelFileError(
            f"{source}: general.type is {shown(str(kind))}, not adapter (give a model with -m, not --lora)"
        )
    if (kind := meta.get(KIND)) != "lora":
        raise UnsupportedError(f"{source}: {KIND} is {shown(str(kind))}; lora is supported")
    if INVOCATION in meta:
        raise UnsupportedError(
            f"{source}: {INVOCATION} is set; adapters that start at a token are not served"
        )
    alpha = meta.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ModelFileError(f"{source}: {ALPHA} is {shown(str(alpha))}; it must be a finite number")
    return float(alpha)


def _targets(file: GGUFFile) -> list[str]:
    """The names of the changed tensors, each of which has both parts of its pair."""
    problems: list[str] = []
    targets: dict[str, None] = {}
    for name, info in file.tensors.items():
        target = name.removesuffix(A).removesuffix(B)
        if target == name:
            if not name.endswith("_norm.weight"):
                problems.append(f"{shown(name)} is no .lora_a or .lora_b")
            continue
        targets[target] = None
        problems += [
            f"{shown(part)} is missing" for part in (target + A, target + B) if part not in file.tensors
        ]
        if len(info.shape) > 2:
            problems.append(f"{shown(name)} is {list(info.shape)}; a pair is made of matrices")
        if info.ggml_type in INTEGERS:
            problems.append(f"{shown(name)} is {info.ggml_type.name}; a pair is made of floats")
    if problems:
        refuse(file.path.name, "no complete adapter", problems)
    if not targets:
        raise ModelFileError(f"{file.path.name}: the adapter changes nothing: it has no .lora_a and .lora_b")
    return list(targets)


def _shapes(file: GGUFFile, target: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The pair's shapes; a rank of 1 may have been dropped as a trailing dimension."""
    a, b = file.tensors[target + A].shape, file.tensors[target + B].shape
    return (1, *a)[-2:], (1, *b)[-2:]  # pyright: ignore[reportReturnType]: two each


def _change_of(file: GGUFFile, target: str) -> Change:
    a, b = _shapes(file, target)
    if target == EMBEDDING:
        a, b = b[::-1], a
    if a[0] != b[1]:
        refuse(
            file.path.name, "a pair does not fit", [f"{shown(target)}: lora_a has rank {a[0]}, lora_b {b[1]}"]
        )
    return Change(target, target, a[0], b[0], a[1])


def _check_norms(file: GGUFFile, norms: list[str], base: Base) -> None:
    shapes = [(name, list(file.tensors[name].shape), list(base.shapes.get(name, ()))) for name in norms]
    problems = [
        f"{shown(name)} is {found}, expected {expected or 'none'}"
        for name, found, expected in shapes
        if found != expected
    ]
    if problems:
        refuse(file.path.name, f"tensors do not fit {base.source}", problems)


def _values(file: GGUFFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return dequantize(file.data(name), info.ggml_type, info.shape)


def _delta(file: GGUFFile, target: str, alpha: float) -> LowRank:
    parts = {target + A: _values(file, target + A), target + B: _values(file, target + B)}
    check_finite(file.path.name, parts)
    a, b = (part.reshape(shape) for part, shape in zip(parts.values(), _shapes(file, target), strict=True))
    if target == EMBEDDING:
        a, b = np.ascontiguousarray(b.T), a
    return LowRank(a, b, alpha / len(a) if alpha else 1.0)
