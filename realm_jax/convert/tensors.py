"""Which tensor of GGUF comes from which of Hugging Face, and its values, some rows at a time.

The names are those that adapters use (`lora.modules`): there is one table of them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from realm_jax.architectures import parameters
from realm_jax.config import ModelConfig
from realm_jax.convert.folder import HFFolder, HFTensor
from realm_jax.ggml import GGMLType
from realm_jax.gguf.writer import Chunk, TensorPlan
from realm_jax.lora.adapter import Base
from realm_jax.lora.fitting import refuse, shown
from realm_jax.lora.modules import EMBEDDING, HEAD, NORM, Layout, Rows
from realm_jax.quant.encoding import tensor_bytes
from realm_jax.quantization.file_types import pure_type

VALUES = 1 << 22  # that are expanded at a time
COMPUTED = (".rotary_emb.inv_freq",)  # buffers that old versions saved
TIED_PATH = ("head",)


@dataclass(frozen=True)
class Source:
    """Where the values of one tensor come from. offset: what is added to them."""

    tensor: HFTensor
    rows: Rows
    offset: float

    def values(self) -> Iterator[np.ndarray]:
        """float32, in the file's order, in pieces of whole heads."""
        count, *inner = self.tensor.shape
        unit = count // self.rows.heads if self.rows.heads else 1
        step = max(1, VALUES // (unit * prod(inner))) * unit if inner else count
        for first in range(0, count, step):
            values = self.tensor.rows(first, min(step, count - first))
            heads = self.rows.heads and len(values) // unit
            yield replace(self.rows, heads=heads).to_file(values) + np.float32(self.offset)


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written, and where its values come from."""

    plan: TensorPlan
    source: Source | np.ndarray

    def chunks(self) -> Iterator[Chunk]:
        """The tensor's bytes. Raises ModelFileError for a value that its type cannot hold."""
        pieces = [self.source] if isinstance(self.source, np.ndarray) else self.source.values()
        for values in pieces:
            yield tensor_bytes(self.plan.name, values, self.plan.ggml_type)


def plan(
    folder: HFFolder,
    config: ModelConfig,
    *,
    is_tied: bool,
    kind: GGMLType,
    factors: Mapping[str, np.ndarray],
) -> list[Planned]:
    """Every tensor of the file, in the order in which layers use them.

    Raises ModelFileError with every tensor that is missing, unknown or of another shape.
    """
    wanted = [p for p in parameters(config) if not (is_tied and p.path == TIED_PATH)]
    shapes = {f"{part.name}.weight": part.shape for p in wanted for part in p.parts}
    biased = {part.name for p in wanted if p.has_bias for part in p.parts}
    layout = Layout(Base(folder.path.name, config, shapes))
    sources = _sources(folder, layout, is_tied, biased)
    found = [
        Planned(TensorPlan(name, tuple(values.shape), GGMLType.F32), values)
        for name, values in factors.items()
    ]
    names = [name for weight in shapes for name in (weight, weight.removesuffix("weight") + "bias")]
    for name in names:
        if (source := sources.get(name)) is not None:
            expanded = TensorPlan(name, source.tensor.shape, GGMLType.F32)
            found.append(Planned(replace(expanded, ggml_type=pure_type(expanded, kind)), source))
    return found


def _sources(folder: HFFolder, layout: Layout, is_tied: bool, biased: set[str]) -> dict[str, Source]:
    """By the names of GGUF's tensors. biased: those of matrices that must have a bias."""
    projections = list(layout.linear(fused=layout.fused()))
    wholes = [EMBEDDING, NORM, *layout.norms(), *([] if is_tied else [HEAD])]
    sources: dict[str, Source] = {}
    problems: list[str] = []
    names = [(module, ".weight") for module in dict.fromkeys(wholes + projections)]
    names += [(module, ".bias") for module in projections]
    for module, suffix in names:
        rows, shape = _joined(layout.rows(module)), layout.shape(module) or ()
        wanted, name = shape if suffix == ".weight" else shape[:1], module + suffix
        if (tensor := folder.tensors.get(name)) is None:
            is_needed = suffix == ".weight" or rows.tensor in biased
            problems += [f"{name} is missing"] if is_needed else []
        elif tensor.shape != wanted:
            problems.append(f"{name} is {list(tensor.shape)}, expected {list(wanted)}")
        else:
            offset = layout.offset(module) if suffix == ".weight" else 0.0
            sources[rows.tensor + suffix] = Source(tensor, rows, offset)
    known = {module + suffix for module, suffix in names} | {f"{HEAD}.weight"}
    extra = sorted(folder.tensors.keys() - known)
    problems += [f"{shown(name)} is unknown" for name in extra if not name.endswith(COMPUTED)]
    if problems:
        refuse(folder.path.name, "tensors do not fit config.json", problems)
    return sources


def _joined(rows: tuple[Rows, ...]) -> Rows:
    """The module's rows, which stand together: fused projections are spelled as the file has them."""
    first, *more = rows
    assert all(other.tensor == first.tensor for other in more)
    return replace(first, count=sum(each.count for each in rows))
