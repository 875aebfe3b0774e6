"""Facts of a model (`ModelConfig`), of a run (`EngineConfig`), and the shapes it compiles (`Buckets`)."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Literal

from realm_jax.errors import RequestError

BLOCK = 256
"""Attention reduces over cache positions in blocks of this size, whatever the capacity; prompts are
prefilled in chunks of it. Both are part of what makes results independent of batch neighbours."""

MIN_ROWS = 4
"""No program computes fewer rows: XLA's CPU products are slow, and sum in another order, below this."""


class Activation(StrEnum):
    """What gates the feed-forward product."""

    SILU = "silu"
    GELU = "gelu"


@dataclass(frozen=True)
class RopeConfig:
    """How one kind of layer turns positions into angles."""

    dims: int
    base: float
    interleaved: bool
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0  # multiplies cos and sin


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one layer's arithmetic from another's; never its index."""

    window: int | None = None  # a key is visible if query position - key position < window
    rope: str = "global"


@dataclass(frozen=True)
class MoEConfig:
    """A softmax router that picks `num_used` of `num_experts` and renormalizes their weights."""

    num_experts: int
    num_used: int


@dataclass(frozen=True)
class ModelConfig:
    """Facts of a model, read from its GGUF metadata. Hashable: the static argument of every program."""

    architecture: str
    vocab_size: int
    context_length: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    ropes: tuple[tuple[str, RopeConfig], ...]
    layers: tuple[LayerKind, ...]
    activation: Activation
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    qk_norm: bool
    post_norms: bool
    moe: MoEConfig | None

    @property
    def cached_values(self) -> int:
        """Numbers that the KV cache keeps of one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class EngineConfig:
    """Facts of a run, named as the CLI's flags.

    ctx_size: tokens a sequence may hold, prompt included; None = the model's context, at most 4096.
    dtype: arithmetic. "float32" expands weights, and keeps the KV cache and all products in float32.
    kv_dtype: storage of the cache; "auto" follows `dtype`.
    max_num_seqs: sequences that run at once; further requests wait.
    memory: bytes that weights and caches may take; None = no limit.
    """

    ctx_size: int | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["auto", "dense"] = "auto"
    kv_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    max_num_seqs: int = 16
    threads: int | None = None
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    memory: int | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise RequestError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            is_left_open = value is None and name != "max_num_seqs"
            if not is_left_open and (type(value) is not int or not 1 <= value <= limit):
                raise RequestError(f"{name} is {value!r}; it must be a whole number from 1 to {limit:,}")
        if not isinstance(self.offline, bool):
            raise RequestError(f"offline is {self.offline!r}; it must be true or false")

    @classmethod
    def from_options(cls, **options: object) -> "EngineConfig":
        """The configuration with these fields set; an unknown name is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise RequestError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**options)  # pyright: ignore[reportArgumentType]: checked in __post_init__

    def context_for(self, model: ModelConfig) -> int:
        """Tokens a sequence may hold with this model."""
        if self.ctx_size is None:
            return min(model.context_length, 4096)
        if self.ctx_size > model.context_length:
            raise RequestError(
                f"context is {self.ctx_size:,} tokens; the model was trained for {model.context_length:,} "
                "(lower --ctx-size)"
            )
        return self.ctx_size


_LIMITS = {"ctx_size": 1 << 24, "max_num_seqs": 1 << 24, "threads": 1 << 24, "memory": 1 << 60}
_CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "weights": ("auto", "dense"),
    "kv_dtype": ("auto", "bfloat16", "float32"),
    "device": ("auto", "cpu", "gpu", "tpu"),
}


@dataclass(frozen=True)
class Pool:
    """`slots` sequences of up to `capacity` cached tokens, stepped together.

    rows: how many leading slots a decode step may compute.
    """

    capacity: int
    slots: int
    rows: tuple[int, ...]

    def rows_for(self, used: int) -> int:
        """The smallest compiled number of rows that covers the first `used` slots."""
        return next(rows for rows in self.rows if rows >= used)


@dataclass(frozen=True)
class Buckets:
    """Every shape that the engine compiles: the one place where lengths are padded."""

    chunks: tuple[int, ...]  # tokens in a prefill call
    pools: tuple[Pool, ...]  # by growing capacity; a sequence moves up by one copy
    max_num_seqs: int = 1 << 10  # sequences that run at once, in all pools together

    @classmethod
    def plan(cls, context: int, max_num_seqs: int) -> "Buckets":
        """Buckets for sequences of up to `context` tokens, `max_num_seqs` at once.

        Large capacities own few slots: past 1,024 tokens, slots shrink as capacity grows, so that
        one long request does not cost every row its memory.
        """
        top = -(-context // BLOCK) * BLOCK
        capacities = [c for c in (BLOCK, 4 * BLOCK, 16 * BLOCK) if c < top]
        pools = []
        for capacity in (*capacities, top):
            slots = max(min(max_num_seqs, max_num_seqs * 1024 // capacity), MIN_ROWS)
            fewer = (r for r in (MIN_ROWS, 16) if r < slots and capacity <= 1024)
            pools.append(Pool(capacity, slots, (*fewer, slots)))
        return cls(chunks=(32, 128, BLOCK), pools=tuple(pools), max_num_seqs=max_num_seqs)

    @property
    def cached_tokens(self) -> int:
        """Tokens that all slots of all pools hold."""
        return sum(pool.slots * pool.capacity for pool in self.pools)

    def chunk_for(self, tokens: int) -> int:
        """The smallest prefill bucket that holds `tokens`."""
        return next(chunk for chunk in self.chunks if chunk >= tokens)

    def programs(self) -> list[str]:
        """The name of every program that an engine of these shapes may compile."""
        names = []
        for i, pool in enumerate(self.pools):
            names += [prefill_name(chunk, pool) for chunk in self.chunks]
            names += [decode_name(rows, pool) for rows in pool.rows]
            names += [move_name(pool)] if i else []
        return names


def prefill_name(tokens: int, pool: Pool) -> str:
    """What a user reads of a prefill program."""
    return f"prefill {tokens} tokens, capacity {pool.capacity}"


def decode_name(rows: int, pool: Pool) -> str:
    """What a user reads of a decode program."""
    return f"decode {rows} rows, capacity {pool.capacity}"


def move_name(pool: Pool) -> str:
    """What a user reads of the program that moves a sequence up into a pool."""
    return f"move to capacity {pool.capacity}"
