"""Adapters written as GGUF and as PEFT files; what was read of either comes back bit for bit in the other."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import writer
from realm_jax.lora.adapter import Adapter, Base, LowRank
from realm_jax.lora.fitting import refuse
from realm_jax.lora.gguf_adapter import ALPHA, EMBEDDING, KIND, A, B
from realm_jax.lora.modules import EMBEDDING as EMBED_TOKENS
from realm_jax.lora.modules import HEAD, Layout
from realm_jax.lora.peft import CONFIG, ROOT, WEIGHTS

F32 = GGMLType.F32


def write_gguf(adapter: Adapter, base: Base, path: Path) -> None:
    """`path` holds the adapter as llama.cpp reads it, in float32.

    The file has one alpha, and a pair's scale is alpha / rank. Alpha is chosen so that it is right for as
    many pairs as can be; of the others (rank_pattern, alpha_pattern, rsLoRA) B is multiplied by what is
    missing, rounded once to float32. Norms are written, though llama.cpp skips them.
    Raises UnsupportedError for DoRA, and for tensors brought whole that are no norms.
    """
    whole = [name for name in adapter.replaced if not name.endswith("_norm.weight")]
    if whole or adapter.magnitudes:
        what = "GGUF adapters cannot hold DoRA or whole tensors (merge with realm lora merge instead)"
        refuse(path.name, what, [*whole, *adapter.magnitudes], UnsupportedError)
    if not adapter.deltas:
        raise UnsupportedError(f"{path.name}: a GGUF adapter without pairs is none (merge the norms instead)")
    alpha = _common_alpha(adapter)
    metadata = {
        "general.architecture": writer.text_value(base.config.architecture),
        "general.type": writer.text_value("adapter"),
        KIND: writer.text_value("lora"),
        ALPHA: writer.real_value(alpha),
    }
    arrays = dict(_pairs(adapter, alpha)) | dict(adapter.replaced)
    plans = [writer.TensorPlan(name, values.shape, F32) for name, values in arrays.items()]
    data = ([np.ascontiguousarray(values, np.dtype("<f4")).tobytes()] for values in arrays.values())
    writer.write(path, metadata, plans, data)


def _alpha(delta: LowRank) -> float:
    """The alpha that gives this pair its scale, as the file can say it."""
    return float(np.float32(delta.scale * delta.rank))


def _common_alpha(adapter: Adapter) -> float:
    """The alpha that is right for most pairs; 0, which means no division by the rank, if that is."""
    counts = Counter(alpha for delta in adapter.deltas.values() if (alpha := _alpha(delta)))
    undivided = sum(delta.scale == 1.0 for delta in adapter.deltas.values())
    alpha, count = counts.most_common(1)[0] if counts else (0.0, 0)
    return alpha if count >= undivided else 0.0


def _pairs(adapter: Adapter, alpha: float) -> Iterator[tuple[str, np.ndarray]]:
    for name, delta in adapter.deltas.items():
        missing = delta.scale / (alpha / delta.rank) if alpha else delta.scale
        if _alpha(delta) == alpha != 0:
            missing = 1.0
        a, b = delta.a, delta.b if missing == 1.0 else (delta.b * missing).astype(np.float32)
        if name == EMBEDDING:
            a, b = b, a.T
        yield name + A, a
        yield name + B, b


def write_peft(adapter: Adapter, base: Base, folder: Path) -> None:
    """`folder` holds the adapter as PEFT saves it, in float32 and in Hugging Face's order of rows.

    Ranks and alphas that differ between modules stand in rank_pattern and alpha_pattern.
    Raises UnsupportedError where DoRA is not for all pairs, and for tensors that no module of PEFT's is.
    """
    from safetensors.numpy import save

    layout = Layout(base)
    tensors = dict(_tensors(adapter, layout))
    config = json.dumps(_config(adapter, layout), indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (folder / CONFIG).write_text(config + "\n", "utf-8")
    except OSError as error:
        raise ModelFileError(f"{folder}: cannot be written: {error.strerror}") from None


def _named(adapter: Adapter, layout: Layout) -> dict[str, str]:
    """The module of each tensor that the adapter changes."""
    every = [*layout.linear(fused=layout.fused()), *layout.norms(), EMBED_TOKENS, HEAD]
    modules = {rows[0].tensor: module for module in every if (rows := layout.rows(module))}
    names = [*adapter.deltas, *adapter.replaced]
    if unknown := [name for name in names if name.rpartition(".")[0] not in modules]:
        refuse(adapter.name, "PEFT has no module for", unknown, UnsupportedError)
    return {name: modules[name.rpartition(".")[0]] for name in names}


def _tensors(adapter: Adapter, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    modules = _named(adapter, layout)

    def in_order(module: str, values: np.ndarray) -> np.ndarray:
        parts = [rows.to_module(values[rows.first : rows.first + rows.count]) for rows in layout.rows(module)]
        return np.concatenate(parts)

    for name, delta in adapter.deltas.items():
        module = modules[name]
        b = in_order(module, delta.b)
        if module == EMBED_TOKENS:
            yield f"{ROOT}{module}.lora_embedding_A", np.ascontiguousarray(b.T)
            yield f"{ROOT}{module}.lora_embedding_B", np.ascontiguousarray(delta.a.T)
        else:
            yield f"{ROOT}{module}.lora_A.weight", np.ascontiguousarray(delta.a)
            yield f"{ROOT}{module}.lora_B.weight", b
        if name in adapter.magnitudes:
            yield f"{ROOT}{module}.lora_magnitude_vector", in_order(module, adapter.magnitudes[name])
    for name, values in adapter.replaced.items():
        module, kind = modules[name], name.rpartition(".")[2]
        wrapped = ".base_layer" if kind == "bias" and name[:-4] + "weight" in adapter.deltas else ""
        offset = np.float32(layout.offset(module) if kind == "weight" else 0)
        yield f"{ROOT}{module}{wrapped}.{kind}", in_order(module, values) - offset


def _config(adapter: Adapter, layout: Layout) -> dict[str, Any]:
    modules = _named(adapter, layout)
    if adapter.magnitudes and adapter.magnitudes.keys() != adapter.deltas.keys():
        missing = [name for name in adapter.deltas if name not in adapter.magnitudes]
        refuse(adapter.name, "PEFT has DoRA for all pairs or none; without it", missing, UnsupportedError)
    pairs = {modules[name]: (delta.rank, _number(delta)) for name, delta in adapter.deltas.items()}
    rank = Counter(rank for rank, _ in pairs.values()).most_common(1)[0][0] if pairs else 8
    alphas = Counter(alpha for _, alpha in pairs.values())
    alpha = alphas.most_common(1)[0][0] if pairs else rank
    saved = [modules[name] for name in adapter.replaced if name.endswith(".weight")]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: each for module, (each, _) in pairs.items() if each != rank},
        "alpha_pattern": {module: each for module, (_, each) in pairs.items() if each != alpha},
        "target_modules": _targets(list(pairs), layout),
        "modules_to_save": saved or None,
        "bias": "all" if any(name.endswith(".bias") for name in adapter.replaced) else "none",
        "use_rslora": False,
        "use_dora": bool(adapter.magnitudes),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _number(delta: LowRank) -> float | int:
    """Alpha, without a fraction where it has none, as PEFT's own configurations have it."""
    alpha = delta.scale * delta.rank
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) < 1e-12 * abs(alpha) else alpha


def _targets(changed: Sequence[str], layout: Layout) -> list[str]:
    """The last names of the changed modules where these mean no other module; else the whole names."""
    every = [*layout.linear(fused=layout.fused()), EMBED_TOKENS, HEAD]
    short = sorted({module.rpartition(".")[2] for module in changed})
    meant = {module for module in every if module.rpartition(".")[2] in short}
    return short if meant == set(changed) else list(changed)
