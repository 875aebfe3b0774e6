"""Changes of Hugging Face's modules, put together as changes of the base's tensors."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.lora.adapter import Adapter, LowRank
from realm_jax.lora.fitting import absent
from realm_jax.lora.modules import EMBEDDING, HEAD, Layout, Rows


@dataclass
class Assembly:
    """Collects what modules bring, then gives the adapter; `source` is the file's name, for messages."""

    source: str
    layout: Layout
    _deltas: dict[str, list[tuple[Rows, np.ndarray, LowRank]]] = field(default_factory=dict)
    _magnitudes: dict[str, list[tuple[Rows, np.ndarray]]] = field(default_factory=dict)
    _wholes: dict[str, list[tuple[Rows, np.ndarray]]] = field(default_factory=dict)
    _tied_head: np.ndarray | None = None

    def add_delta(self, module: str, delta: LowRank) -> None:
        for rows, b in self._parts(module, delta.b):
            self._deltas.setdefault(f"{rows.tensor}.weight", []).append((rows, b, delta))

    def add_magnitude(self, module: str, lengths: np.ndarray) -> None:
        for rows, part in self._parts(module, lengths):
            self._magnitudes.setdefault(f"{rows.tensor}.weight", []).append((rows, part))

    def add_whole(self, module: str, suffix: str, values: np.ndarray) -> None:
        if module == HEAD and not self.layout.rows(HEAD):
            self._tied_head = values
        for rows, part in self._parts(module, values):
            self._wholes.setdefault(rows.tensor + suffix, []).append((rows, part))

    def _parts(self, module: str, values: np.ndarray) -> list[tuple[Rows, np.ndarray]]:
        """The module's rows cut where they stand apart, in the order of the file."""
        runs = self.layout.rows(module)
        ends = np.cumsum([rows.count for rows in runs])
        cuts = zip(runs, np.split(values, ends[:-1]), strict=True) if runs else ()
        return [(rows, rows.to_file(part)) for rows, part in cuts]

    def adapter(self, name: str) -> Adapter:
        """All that was added, by the base's tensors.

        Raises UnsupportedError where only a part of a tensor gets values of its own, and where an embedding
        and the head tied to it part.
        """
        shapes = self.layout.base.shapes
        for tensor, pieces in self._deltas.items():
            self._check_once(tensor, [rows for rows, _, _ in pieces])
        if missing := [tensor for tensor in self._wholes if tensor not in shapes]:
            raise ModelFileError(f"{self.source}: {'; '.join(map(absent, missing))}")
        deltas = {tensor: _joined(pieces, shapes[tensor][0]) for tensor, pieces in self._deltas.items()}
        magnitudes = {
            tensor: self._covered(tensor, pieces, shapes[tensor][:1])
            for tensor, pieces in self._magnitudes.items()
        }
        wholes = {
            tensor: self._covered(tensor, pieces, shapes[tensor]) for tensor, pieces in self._wholes.items()
        }
        self._check_tied(wholes)
        return Adapter(name, deltas, wholes, magnitudes)

    def _check_once(self, tensor: str, pieces: list[Rows]) -> None:
        """No two modules change the same rows, such as q_proj and qkv_proj."""
        ordered = sorted(pieces, key=lambda rows: rows.first)
        if any(a.first + a.count > b.first for a, b in pairwise(ordered)):
            raise ModelFileError(f"{self.source}: two modules change the same rows of {tensor}")

    def _covered(
        self, tensor: str, pieces: list[tuple[Rows, np.ndarray]], shape: tuple[int, ...]
    ) -> np.ndarray:
        if sum(rows.count for rows, _ in pieces) != shape[0]:
            raise UnsupportedError(
                f"{self.source}: the adapter gives its own values (DoRA, modules_to_save or a bias) to other "
                f"rows than all of {tensor}, once each (merge the adapter where it was trained)"
            )
        values = np.empty(shape, np.float32)
        for rows, part in pieces:
            values[rows.first : rows.first + rows.count] = part
        return values

    def _check_tied(self, wholes: dict[str, np.ndarray]) -> None:
        embedding = next((r.tensor for r in self.layout.rows(EMBEDDING)), "")
        changed, head = wholes.get(f"{embedding}.weight"), self._tied_head
        if "output.weight" in self.layout.base.shapes or (changed is None and head is None):
            return
        if changed is None or head is None or not np.array_equal(changed, head):
            raise UnsupportedError(
                f"{self.source}: modules_to_save brings an embedding and an output head that differ; in "
                f"{self.layout.base.source} they are one tensor (use a base file with its own output.weight)"
            )


def _joined(pieces: list[tuple[Rows, np.ndarray, LowRank]], outputs: int) -> LowRank:
    """The changes of all pieces as one: their ranks side by side, zeros where a piece has no rows."""
    if len(pieces) == 1 and pieces[0][0].count == outputs:
        _, b, delta = pieces[0]
        return LowRank(delta.a, b, delta.scale)
    deltas = {id(delta): delta for _, _, delta in pieces}
    scales = {delta.scale for delta in deltas.values()}
    scale = scales.pop() if len(scales) == 1 else 1.0
    ranks = np.cumsum([0, *(delta.rank for delta in deltas.values())])
    first_column = dict(zip(deltas, ranks.tolist(), strict=False))
    b = np.zeros((outputs, int(ranks[-1])), np.float32)
    for rows, part, delta in pieces:
        column = first_column[id(delta)]
        b[rows.first : rows.first + rows.count, column : column + delta.rank] = part * np.float32(
            delta.scale / scale if scale else 1.0
        )
    return LowRank(np.concatenate([delta.a for delta in deltas.values()]), b, scale)
