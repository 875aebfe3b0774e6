"""What each device of a mesh has of a model: heads, features and tokens, and their rows and columns.

Letters: n devices, N query heads, K kv heads, H head dim, F features, V vocabulary, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from realm_jax.architectures import Parameter, parameters
from realm_jax.config import ModelConfig, Numerics, QKNorm
from realm_jax.errors import UnsupportedError
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.lora import Adapter, LowRank
from realm_jax.projections import Layout, Stored


@dataclass(frozen=True)
class Span:
    """`count` rows or columns: `real` ones of the whole from `first` on, then zeros."""

    first: int
    real: int
    count: int

    def times(self, size: int) -> "Span":
        """The same of units of so many."""
        return Span(self.first * size, self.real * size, self.count * size)

    def of(self, whole: np.ndarray) -> np.ndarray:
        """These rows of an array."""
        taken = whole[self.first : self.first + self.real]
        missing = [(0, self.count - self.real), *((0, 0) for _ in whole.shape[1:])]
        return np.ascontiguousarray(np.pad(taken, missing) if self.count > self.real else taken)


def _even(total: int, shares: int, index: int) -> Span:
    """Share `index` of `total` things, all shares being of one size."""
    count = -(-total // shares)
    first = min(index * count, total)
    return Span(first, min(count, total - first), count)


@dataclass(frozen=True)
class Division:
    """A model divided over `devices`, checked.

    Raises UnsupportedError for a number of devices that the heads or the features do not allow.
    """

    config: ModelConfig
    devices: int

    def __post_init__(self) -> None:
        c, n = self.config, self.devices
        if indivisible := _indivisible(c):
            raise UnsupportedError(
                f"mesh is 'tp={n}', but {c.architecture} has {indivisible} (leave mesh out)"
            )
        for size in _feed_forward_sizes(c):
            if size % n:
                self._refuse(f"{size:,} feed-forward features are no multiple of {n}")
        if n % c.num_kv_heads and self._kv_heads * n >= 2 * c.num_kv_heads:
            self._refuse(
                f"{c.num_kv_heads} key-value heads can be divided over as many devices or a multiple of them"
            )
        if self._heads * n >= 2 * c.num_heads:
            self._refuse(f"{c.num_heads} heads would leave half of the devices without one")

    def _refuse(self, problem: str) -> None:
        fitting = [str(n) for n in range(2, self.devices) if _fits(self.config, n)]
        remedy = f"tp={', '.join(fitting)}" if fitting else "one device: leave mesh out"
        raise UnsupportedError(f"mesh is 'tp={self.devices}', but {problem} (this model allows {remedy})")

    @property
    def _copies(self) -> int:
        """Devices that have the same key-value head, each with some of its queries."""
        n, K = self.devices, self.config.num_kv_heads
        return n // K if n % K == 0 else 1

    @property
    def _kv_heads(self) -> int:
        return -(-self.config.num_kv_heads * self._copies // self.devices)

    @property
    def _heads(self) -> int:
        """Query heads of a device."""
        group = self.config.num_heads // self.config.num_kv_heads
        return -(-group // self._copies) * self._kv_heads

    @property
    def local(self) -> ModelConfig:
        """The model as one device computes it: fewer heads and features."""
        c, n = self.config, self.devices
        moe = c.moe and replace(c.moe, size=c.moe.size // n, shared_size=c.moe.shared_size // n)
        heads = {"num_heads": self._heads, "num_kv_heads": self._kv_heads}
        return replace(c, **heads, ffn_size=c.ffn_size // n, moe=moe)

    def kv_heads(self, index: int) -> Span:
        """A device's key-value heads."""
        if self._copies > 1:
            return Span(index // self._copies, 1, 1)
        return _even(self.config.num_kv_heads, self.devices, index)

    def heads(self, index: int) -> Span:
        """A device's query heads: those of its key-value heads, or a part of those of the one it has."""
        group = self.config.num_heads // self.config.num_kv_heads
        kv = self.kv_heads(index)
        if self._copies == 1:
            return kv.times(group)
        mine = _even(group, self._copies, index % self._copies)
        return replace(mine, first=kv.first * group + mine.first)

    def share(self, index: int) -> "Share":
        """What the device has."""
        return Share(self, index)


def _indivisible(config: ModelConfig) -> str | None:
    """What of the model cannot be divided over devices."""
    if config.latent is not None:
        return "latent attention, one vector for all heads"
    if config.sinks:
        return "attention sinks"
    if config.is_recurrent:
        return "recurrent layers"
    if any(kind.sizes is not None for kind in config.layers):
        return "layers of different sizes"
    return {
        QKNorm.PROJECTION: "norms over all heads together",
        QKNorm.EACH_HEAD: "norms with factors of each head",
    }.get(config.qk_norm)


def _feed_forward_sizes(config: ModelConfig) -> set[int]:
    """Features of each kind of feed-forward layer that there is."""
    if config.moe is None:
        return {config.ffn_size}
    dense = {config.ffn_size} if any(kind.dense for kind in config.layers) else set()
    return (dense | {config.moe.size, config.moe.shared_size}) - {0}


def _fits(config: ModelConfig, devices: int) -> bool:
    try:
        Division(config, devices)
    except UnsupportedError:
        return False
    return True


@dataclass(frozen=True)
class Whole:
    """The share of a device that is alone."""

    def parts(self, p: Parameter, parts: Sequence[Stored], numerics: Numerics) -> list[Stored]:
        """The matrices of a parameter."""
        return list(parts)

    def bias(self, p: Parameter, bias: np.ndarray) -> np.ndarray:
        """The bias of a parameter."""
        return bias

    def adapter(self, adapter: Adapter) -> Adapter:
        """The adapter."""
        return adapter


@dataclass(frozen=True)
class Share(Whole):
    """What one device of several has."""

    division: Division
    index: int

    def parts(self, p: Parameter, parts: Sequence[Stored], numerics: Numerics) -> list[Stored]:
        """The device's rows or columns of a parameter's matrices, stacked as those are.

        Raises UnsupportedError where columns would cut blocks of codes that are to stay as they are.
        """
        if (columns := self._inputs(p)) is not None:
            return [_columns(part, columns, numerics, p.parts[0].name) for part in parts]
        outputs = self._outputs(p, [part.shape[0] for part in parts])
        return [_rows(part, span) for part, spans in zip(parts, outputs, strict=True) for span in spans]

    def bias(self, p: Parameter, bias: np.ndarray) -> np.ndarray:
        """The device's part of a bias; of what is summed over the devices, the first has all."""
        if self._inputs(p) is not None:
            return bias if self.index == 0 else np.zeros_like(bias)
        (spans,) = self._outputs(p, [len(bias)])
        return np.concatenate([span.of(bias) for span in spans])

    def adapter(self, adapter: Adapter) -> Adapter:
        """What the adapter changes of the device's share."""
        deltas = {}
        for p in parameters(self.division.config):
            outputs = self._outputs(p, [part.shape[-2] for part in p.parts]) if not p.is_vector else ()
            for part, spans in zip(p.parts, outputs, strict=False):
                name = f"{part.name}.weight"
                if (delta := adapter.deltas.get(name)) is not None:
                    deltas[name] = self._delta(p, delta, spans)
        return replace(adapter, deltas=deltas)

    def _delta(self, p: Parameter, delta: LowRank, spans: Sequence[Span]) -> LowRank:
        if (columns := self._inputs(p)) is not None:
            return replace(delta, a=np.ascontiguousarray(columns.of(delta.a.T).T))
        return replace(delta, b=np.concatenate([span.of(delta.b) for span in spans]))

    def _inputs(self, p: Parameter) -> Span | None:
        """The device's inputs of a projection whose products are summed; None of others."""
        c, n = self.division.config, self.division.devices
        match p.path:
            case (*_, "out", "kernel"):
                return self.division.heads(self.index).times(c.head_dim)
            case (*_, "down", "kernel") | (*_, "experts", "down", _):
                return _even(p.parts[0].shape[-1], n, self.index)
        return None

    def _outputs(self, p: Parameter, rows: Sequence[int]) -> list[list[Span]]:
        """The device's rows of each of the parts, which have so many."""
        groups = self._groups(p)
        if not groups:
            return [[Span(0, count, count)] for count in rows]
        ends = np.cumsum(rows)
        found: list[list[Span]] = [[] for _ in rows]
        start = 0
        for total, span in groups:
            part = int(np.searchsorted(ends, start, side="right"))
            within = start - (int(ends[part]) - rows[part])
            found[part].append(replace(span, first=within + span.first))
            start += total
        return found

    def _groups(self, p: Parameter) -> list[tuple[int, Span]]:
        """The runs of outputs that are divided: how many the whole has, and the device's own."""
        d, c = self.division, self.division.config
        match p.path:
            case (*_, "qkv", "kernel"):
                q, kv = d.heads(self.index).times(c.head_dim), d.kv_heads(self.index).times(c.head_dim)
                each = c.num_kv_heads * c.head_dim
                return [(c.num_heads * c.head_dim, q), (each, kv), (each, kv)]
            case (*_, "gate_up", "kernel") | (*_, "experts", "gate_up", _):
                size = sum(part.shape[-2] for part in p.parts) // 2
                return [(size, _even(size, d.devices, self.index))] * 2
            case (*_, "up", "kernel"):
                size = p.parts[0].shape[-2]
                return [(size, _even(size, d.devices, self.index))]
            case ("embedding",) | ("head",):
                return [(c.vocab_size, _even(c.vocab_size, d.devices, self.index))]
        return []


def _rows(part: Stored, span: Span) -> Stored:
    """Some rows of a matrix; blocks of zero bytes are zeros in every type."""
    data = part.data.reshape(part.shape[0], -1)
    return Stored(span.of(data).reshape(-1), part.kind, (span.count, part.shape[1]))


def _columns(part: Stored, span: Span, numerics: Numerics, name: str) -> Stored:
    """Some columns of a matrix, in its own blocks or, where these are not kept, in float32."""
    block = BLOCK_SIZES[part.kind]
    if any(edge % block.elements for edge in (span.first, span.real, span.count)):
        if part.layout(numerics) is Layout.BLOCKS:
            raise UnsupportedError(
                f"{name} is {part.kind.name} in blocks of {block.elements} inputs, which a device's "
                f"{span.count:,} inputs would cut (weights='dense', or a mesh of fewer devices)"
            )
        values = part.values(0, part.shape[0])
        part = Stored(values.reshape(-1).view(np.uint8), GGMLType.F32, part.shape)
        block = BLOCK_SIZES[part.kind]
    rows, per_row = part.shape[0], part.shape[1] // block.elements
    blocks = part.data.reshape(rows, per_row, block.nbytes)
    in_blocks = Span(*(edge // block.elements for edge in (span.first, span.real, span.count)))
    taken = in_blocks.of(blocks.swapaxes(0, 1)).swapaxes(0, 1)
    return Stored(np.ascontiguousarray(taken).reshape(-1), part.kind, (rows, span.count))
