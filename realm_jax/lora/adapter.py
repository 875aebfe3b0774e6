"""What an adapter changes, whichever file it came from.

R rank, I inputs, O outputs of a matrix.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from realm_jax.config import ModelConfig
from realm_jax.gguf import GGUFFile


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change `scale * b @ a` of one matrix [O, I] (Hu et al. 2021), in GGUF's order of rows.

    scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023); 1 where alpha is 0 or absent.
    """

    a: np.ndarray  # float32 [R, I]
    b: np.ndarray  # float32 [O, R]
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def rows(self, first: int, last: int) -> np.ndarray:
        """Some rows of the change, float32 [last - first, I]."""
        return np.float32(self.scale) * (self.b[first:last] @ self.a)


@dataclass(frozen=True, eq=False)
class Adapter:
    """All that one adapter changes, by the name of the GGUF tensor ("blk.0.attn_q.weight").

    replaced: tensors that the adapter brings whole (PEFT's modules_to_save, and trained biases).
    magnitudes: DoRA's lengths of the columns of a changed matrix (Liu et al. 2024). Only folding knows
      these two: an adapter that has them cannot be applied per request.
    """

    name: str
    deltas: Mapping[str, LowRank]
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32, shaped as the tensor
    magnitudes: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [O]

    @property
    def rank(self) -> int:
        """The largest rank of a delta."""
        return max((delta.rank for delta in self.deltas.values()), default=0)

    def digest(self) -> str:
        """A name for what it changes, the same for any file that says the same."""
        found = hashlib.sha256()
        for name in sorted(self.deltas):
            delta = self.deltas[name]
            found.update(f"{name} {delta.a.shape} {delta.scale!r}\0".encode())
            found.update(delta.a.tobytes() + delta.b.tobytes())
        for kind in (self.replaced, self.magnitudes):
            for name in sorted(kind):
                found.update(f"{name} {kind[name].shape}\0".encode() + kind[name].tobytes())
        return found.hexdigest()

    def changes(self, name: str) -> bool:
        """Whether the tensor is another with this adapter."""
        return name in self.deltas or name in self.replaced


@dataclass(frozen=True)
class Base:
    """Facts of the model that an adapter must fit."""

    source: str  # the file's name, for messages
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]  # of its tensors, [O, I]

    @classmethod
    def of(cls, file: GGUFFile, config: ModelConfig) -> "Base":
        """The facts of an open file."""
        return cls(file.path.name, config, {name: info.shape for name, info in file.tensors.items()})
