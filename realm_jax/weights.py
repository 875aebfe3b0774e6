"""GGUF tensors -> params: a nested dict of weight nodes, loaded tensor by tensor."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import jax
import numpy as np

from realm_jax import projections
from realm_jax.architectures import Parameter, Part, parameters, unread_tensors
from realm_jax.config import ModelConfig, Numerics
from realm_jax.errors import ModelFileError
from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile
from realm_jax.lora import FoldedFile
from realm_jax.nodes import Biased, Rotary
from realm_jax.parallel import OneDevice, Placement
from realm_jax.parallel.shares import Whole
from realm_jax.projections import Stored
from realm_jax.quant import dequantize

Params = dict[str, Any]
TensorFile = GGUFFile | FoldedFile
Progress = Callable[[int], None]  # called with the bytes of the file that were just read

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

LOOKED_UP = ("embedding", "positions")
"""Matrices of which rows are taken, and that have no bias."""

ONE_DEVICE = OneDevice()


def load(
    file: TensorFile,
    config: ModelConfig,
    *,
    numerics: Numerics,
    context: int,
    placement: Placement = ONE_DEVICE,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Params:
    """The model's params, where `placement` says, stored and multiplied as `numerics` says.

    context: tokens a sequence may hold; it chooses between long and short rope factors.
    Raises ModelFileError with all missing, extra and mis-shaped tensors before anything is read.
    """
    wanted = parameters(config)
    check_tensors(file, config)
    present = [p for p in wanted if _is_present(file, p)]
    params: Params = {"rope": placement.same(lambda: _ropes(file, config, context, numerics))}
    load = partial(_load_parameter, file, config, numerics, placement, progress)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for parameter, node in zip(present, pool.map(load, present), strict=True):
            _put(params, parameter.path, node)
    join = partial(projections.experts, numerics=numerics)
    for layer in params.values():
        if "experts" in (mlp := layer.get("mlp", {}) if isinstance(layer, dict) else {}):
            mlp["experts"] = placement.each(join, mlp["experts"])
    params.setdefault("head", params["embedding"])  # tied
    return params


def _load_parameter(
    file: TensorFile,
    config: ModelConfig,
    numerics: Numerics,
    placement: Placement,
    progress: Progress | None,
    p: Parameter,
) -> Any:
    node = _node(file, config, numerics, placement, p)
    for part in p.parts:
        file.release(part.tensor)
    if progress is not None:
        progress(sum(_part_bytes(file, part) for part in p.parts))
    return node


def _node(
    file: TensorFile, config: ModelConfig, numerics: Numerics, placement: Placement, p: Parameter
) -> Any:
    """The parameter's weight node."""
    first = p.parts[0]
    match p.kind:
        case "matrix":
            return _matrix(file, config, numerics, placement, p)
        case "heads":
            return placement.same(lambda: projections.per_head(_head_matrices(file, first), numerics))
        case "vector":
            return placement.same(lambda: jax.device_put(_vector(file, first.tensor)))
        case "rms":
            return placement.same(lambda: projections.scale(_vector(file, first.tensor), numerics))
        case "layer":
            bias = _bias(file, p.parts)
            return placement.same(lambda: projections.centered_scale(_vector(file, first.tensor), bias))


def _matrix(
    file: TensorFile, config: ModelConfig, numerics: Numerics, placement: Placement, p: Parameter
) -> Any:
    parts, bias = [_stored(file, part) for part in p.parts], _bias(file, p.parts)
    mine = _numerics_of(p, numerics)

    def share(of: Whole) -> Any:
        kernel = projections.projection(of.parts(p, parts, mine), mine)
        return kernel if bias is None else Biased(kernel, jax.device_put(of.bias(p, bias)))

    return placement.split(config, share)


def _numerics_of(p: Parameter, numerics: Numerics) -> Numerics:
    """Those of the run, but int8 spares what loses most by it: the choice of experts; in XLA's large chunks
    also the head (and the embedding, which may be the head) and what returns from the feed-forward layer.
    """
    if numerics.weights != "int8":
        return numerics
    if numerics.kernels in ("native", "pallas"):
        return replace(numerics, weights="quantized") if "router" in p.path else numerics
    is_spared = {"router", "down", "head", "embedding"} & set(p.path)
    return replace(numerics, weights="dense") if is_spared else numerics


def _stored(file: TensorFile, part: Part) -> Stored:
    """The part's matrix as it lies in the file."""
    kind = GGMLType(file.tensors[part.tensor].ggml_type)
    return Stored(_bytes(file, part.tensor, part.expert), kind, (part.shape[-2], part.shape[-1]))


def _unread(file: TensorFile, part: Part) -> Stored:
    """As `_stored`, with zeros that take no memory for the bytes of the file."""
    kind = GGMLType(file.tensors[part.tensor].ggml_type)
    zeros = np.broadcast_to(np.zeros(1, np.uint8), (_part_bytes(file, part),))
    return Stored(zeros, kind, (part.shape[-2], part.shape[-1]))


def _bias(file: TensorFile, parts: tuple[Part, ...]) -> np.ndarray | None:
    """The parts' biases one after another, zeros for those that have none; None where no part has one."""
    if not _is_biased(file, parts):
        return None
    return np.concatenate([_part_bias(file, part) for part in parts])


def _part_bias(file: TensorFile, part: Part) -> np.ndarray:
    name = part.name + ".bias"
    if name not in file.tensors:
        return np.zeros(part.shape[-2], np.float32)
    info = file.tensors[name]
    shape = info.shape if part.expert is None else info.shape[1:]
    return dequantize(_bytes(file, name, part.expert), info.ggml_type, shape)


def _bytes(file: TensorFile, name: str, expert: int | None) -> np.ndarray:
    """The tensor's bytes in the file, or those of one expert: the first axis is that of experts."""
    info, data = file.tensors[name], file.data(name)
    if expert is None:
        return data
    each = info.nbytes // info.shape[0]
    return data[expert * each :][:each]


def _is_biased(file: TensorFile, parts: tuple[Part, ...]) -> bool:
    return any(part.name + ".bias" in file.tensors for part in parts)


def _ropes(file: TensorFile, config: ModelConfig, context: int, numerics: Numerics) -> dict[str, Rotary]:
    """The turns by rope name; a file's own factors apply to the global one."""
    ropes = dict(config.ropes)
    is_long = context > ropes["global"].original_context
    names = ("rope_freqs.weight", f"rope_factors_{'long' if is_long else 'short'}.weight")
    factors = next((_vector(file, name) for name in names if name in file.tensors), None)
    pairs = ropes["global"].dims // 2
    if factors is not None and (
        factors.shape != (pairs,) or not (np.isfinite(factors) & (factors > 0)).all()
    ):
        raise ModelFileError(f"{file.path.name}: rope factors must be {pairs} positive numbers")
    return {
        name: projections.rotary(kind, factors if name == "global" else None, numerics)
        for name, kind in ropes.items()
    }


def check_tensors(file: TensorFile, config: ModelConfig) -> None:
    """Raises one error that names every tensor that is missing, extra or of another shape.

    Those of layers that only draft are left alone.
    """
    problems: list[str] = []
    last = config.num_layers
    unused = tuple(f"blk.{i}." for i in range(last, last + config.unused_layers))
    known = unread_tensors(config).union(ROPE_TENSORS)
    for parameter in parameters(config):
        for part in parameter.parts:
            weight, bias = part.tensor, part.name + ".bias"
            shapes = {weight: part.shape}
            if parameter.kind in ("matrix", "layer") and parameter.path[-1] not in LOOKED_UP:
                outputs = part.shape[:1] if part.expert is None else part.shape[:2]
                shapes[bias] = outputs if parameter.kind == "matrix" else part.shape
            known.update(shapes)
            required = {weight: not parameter.optional, bias: parameter.has_bias}
            problems += [
                f"{name} is missing" for name in shapes if required[name] and name not in file.tensors
            ]
            problems += [
                f"{name} is {list(file.tensors[name].shape)}, expected {list(shape)}"
                for name, shape in shapes.items()
                if name in file.tensors and file.tensors[name].shape != shape
            ]
    problems += [
        f"{ascii(name)[1:-1][:100]} is unknown"
        for name in file.tensors
        if name not in known and not name.startswith(unused)
    ]
    problems = list(dict.fromkeys(problems))  # an expert's tensor is named once, not once an expert
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ModelFileError(
            f"{file.path.name}: tensors do not fit the model: {'; '.join(problems[:20])}{more}"
        )


def planned_bytes(file: TensorFile, config: ModelConfig, numerics: Numerics) -> int:
    """What `resident_bytes` of the loaded params will be."""
    nodes = sum(_planned(file, p, numerics) for p in parameters(config) if _is_present(file, p))
    return nodes + sum(4 * (rope.dims // 2) for _, rope in config.ropes)


def _planned(file: TensorFile, p: Parameter, numerics: Numerics) -> int:
    if p.kind == "layer":
        return 8 * prod(p.parts[0].shape)
    if p.is_vector:
        return 4 * prod(p.parts[0].shape)
    if p.kind == "heads":
        return projections.dense_bytes(_head_shape(p.parts[0]), numerics)
    biases = sum(part.shape[-2] for part in p.parts) if _is_biased(file, p.parts) else 0
    parts = [_unread(file, part) for part in p.parts]
    return 4 * biases + projections.planned_bytes(parts, _numerics_of(p, numerics))


def resident_bytes(params: Params) -> int:
    """Bytes of all arrays, a shared one counted once."""
    return sum({id(x): x.nbytes for x in jax.tree.leaves(params)}.values())


def _is_present(file: TensorFile, p: Parameter) -> bool:
    return p.parts[0].tensor in file.tensors


def _part_bytes(file: TensorFile, part: Part) -> int:
    nbytes = file.tensors[part.tensor].nbytes
    if part.rows is not None:
        return nbytes * part.rows.count // part.rows.height
    return nbytes if part.expert is None else nbytes // part.shape[0]


def _head_matrices(file: TensorFile, part: Part) -> np.ndarray:
    """A matrix for each head [N, O, I]."""
    whole, rows = _vector(file, part.tensor), part.rows
    if rows is None:
        return whole
    mine = whole.reshape(rows.heads, rows.height, -1)[:, rows.first :][:, : rows.count]
    return mine.swapaxes(1, 2) if rows.is_transposed else mine


def _head_shape(part: Part) -> tuple[int, ...]:
    """As many numbers as `_head_matrices` gives."""
    return part.shape if part.rows is None else (part.rows.heads, part.rows.count, part.shape[1])


def _vector(file: TensorFile, name: str) -> np.ndarray:
    info = file.tensors[name]
    return dequantize(file.data(name), info.ggml_type, info.shape)


def _put(tree: Params, path: Iterable[str], node: Any) -> None:
    *parents, leaf = path
    for name in parents:
        tree = tree.setdefault(name, {})
    tree[leaf] = node
