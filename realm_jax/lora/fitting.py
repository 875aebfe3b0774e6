"""Whether an adapter's tensors fit its base model: every misfit is found before anything is expanded."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.adapter import Base

SHOWN = 20


@dataclass(frozen=True)
class Change:
    """What a file says of one tensor of the base, before its values are read.

    source: the name in the file, for messages. outputs and inputs: of the pair's product.
    """

    name: str
    source: str
    rank: int
    outputs: int
    inputs: int


def shown(name: str) -> str:
    """A name from a file, on one line, and short."""
    return ascii(name)[1:-1][:100]


def refuse(source: str, what: str, problems: Sequence[str], kind: type = ModelFileError) -> NoReturn:
    """One error for all problems."""
    unique = list(dict.fromkeys(problems))
    more = f" and {len(unique) - SHOWN} more" if len(unique) > SHOWN else ""
    raise kind(f"{source}: {what}: {'; '.join(unique[:SHOWN])}{more}")


def check_architecture(source: str, architecture: object, base: Base) -> None:
    if architecture != base.config.architecture:
        raise ModelFileError(
            f"{source}: the adapter is for {shown(str(architecture))}; {base.source} is "
            f"{base.config.architecture} (use the model that the adapter was trained on)"
        )


def check_changes(source: str, changes: Iterable[Change], base: Base) -> None:
    """Raises one error that names every change that the base has no place for."""
    changes = list(changes)
    if experts := [shown(c.source) for c in changes if len(base.shapes.get(c.name, ())) > 2]:
        what = "adapters of expert matrices are not supported (merge the adapter where it was trained)"
        refuse(source, what, experts, UnsupportedError)
    problems = [problem for change in changes for problem in _misfits(change, base)]
    if problems:
        refuse(source, f"tensors do not fit {base.source}", problems)
    refuse_tied(source, [change.name for change in changes], base)


def refuse_tied(source: str, names: Iterable[str], base: Base) -> None:
    """Raises UnsupportedError where an adapter changes one of embedding and head, and both are one tensor."""
    if "output.weight" not in base.shapes and "token_embd.weight" in names:
        raise UnsupportedError(
            f"{source}: the adapter changes the embedding alone; in {base.source} embedding and output head "
            "are one tensor, token_embd.weight (use a base file with its own output.weight)"
        )


def _misfits(change: Change, base: Base) -> list[str]:
    shape = base.shapes.get(change.name)
    if shape is None:
        return [f"{shown(change.source)}: {absent(change.name)}"]
    return misfits(change.source, change.outputs, change.inputs, change.rank, shape)


def absent(name: str) -> str:
    """A sentence on a tensor that the base does not have."""
    if name == "output.weight":
        return "the model has no output.weight, as its head is tied to the embedding"
    return f"the model has no tensor {shown(name)}"


def misfits(source: str, outputs: int, inputs: int, rank: int, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with a pair for a matrix of this shape.

    A rank above the larger side of the matrix adds nothing but memory.
    """
    where = shown(source)
    if len(shape) != 2:
        return [f"{where}: the tensor is no matrix but {list(shape)}"]
    if (outputs, inputs) != shape:
        return [f"{where}: the product is {[outputs, inputs]}, expected {list(shape)}"]
    if not 1 <= rank <= max(shape):
        return [f"{where}: rank is {rank:,}; it must be from 1 to {max(shape):,}"]
    return []


def check_finite(source: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises one error that names every array with a NaN or an infinite value."""
    if broken := [shown(name) for name, array in arrays.items() if not np.isfinite(array).all()]:
        refuse(source, "values are NaN or infinite", broken)
