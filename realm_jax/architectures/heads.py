"""How many heads there are, and how large: of plain attention and of latent attention."""

from dataclasses import dataclass

from realm_jax.architectures.facts import Architecture
from realm_jax.config import LatentConfig
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.metadata import Metadata

MAX_HEADS = MAX_HEAD_DIM = 1 << 14


@dataclass(frozen=True)
class Heads:
    """The heads as the cache keeps them; rope_dim of a query are turned by default, score_dim scored."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_dim: int
    score_dim: int
    latent: LatentConfig | None = None


def read_heads(arch: Architecture, meta: Metadata, hidden: int, layers: int) -> Heads:
    """The heads of a file's model; where layers differ, the most, as large as without a window."""
    heads = meta.count("attention.head_count", MAX_HEADS)
    if arch.latent:
        return _latent(meta, heads)
    key = "attention.head_count_kv"
    if arch.varied:
        return _plain(meta, hidden, heads, max(meta.counts(key, layers, MAX_HEADS)))
    return _plain(meta, hidden, heads, meta.count(key, MAX_HEADS, default=heads))


def _plain(meta: Metadata, hidden: int, heads: int, kv_heads: int) -> Heads:
    key_length = meta.count("attention.key_length", MAX_HEAD_DIM, default=_even_share(hidden, heads, meta))
    if meta.count("attention.value_length", MAX_HEAD_DIM, default=key_length) != key_length:
        raise UnsupportedError(f"{meta.source}: attention.value_length differs from key_length {key_length}")
    if heads % kv_heads:
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.attention.head_count is {heads}, no multiple of "
            f"head_count_kv {kv_heads}"
        )
    return Heads(heads, kv_heads, key_length, key_length, key_length)


def _even_share(hidden: int, heads: int, meta: Metadata) -> int:
    if hidden % heads and not meta.has("attention.key_length"):
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.embedding_length is {hidden}, no multiple of "
            f"attention.head_count {heads}"
        )
    return hidden // heads


def _latent(meta: Metadata, heads: int) -> Heads:
    """One kv head, of the latent vector and the turned part of the key, which all queries share.

    Files from before April 2025 have other keys, and keys' and values' matrices in one tensor.
    """
    is_joined = not meta.has("attention.key_length_mla")
    suffix = "" if is_joined else "_mla"
    rope_dim = meta.count("rope.dimension_count", MAX_HEAD_DIM)
    key_length = meta.count(f"attention.key_length{suffix}", MAX_HEAD_DIM)
    if key_length <= rope_dim:
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.attention.key_length{suffix} is {key_length}; it must be "
            f"more than rope.dimension_count {rope_dim}"
        )
    latent = LatentConfig(
        query_rank=meta.count("attention.q_lora_rank", 1 << 20, default=0),
        rank=meta.count("attention.kv_lora_rank", MAX_HEAD_DIM),
        plain_dim=key_length - rope_dim,
        rope_dim=rope_dim,
        value_dim=meta.count(f"attention.value_length{suffix}", MAX_HEAD_DIM),
        is_joined=is_joined,
    )
    return Heads(heads, 1, latent.rank + rope_dim, rope_dim, key_length, latent)
