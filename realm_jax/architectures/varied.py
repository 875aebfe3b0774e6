"""Layers that differ in more than their window: in size, and in whose keys and values they read."""

from dataclasses import replace

from realm_jax.architectures.heads import MAX_HEAD_DIM, MAX_HEADS
from realm_jax.architectures.mixture import MAX_SIZE
from realm_jax.config import LayerKind, LayerSizes
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.gguf import GGUFFile
from realm_jax.metadata import Metadata


def varied_kinds(
    meta: Metadata, file: GGUFFile, num_heads: int, kinds: tuple[LayerKind, ...]
) -> tuple[LayerKind, ...]:
    """The kinds with the sizes of each, and with what its keys and values are.

    Raises ModelFileError where windows, or the turns of layers without one, would have to be guessed.
    """
    _require(meta, file, kinds)
    kv_heads = meta.counts("attention.head_count_kv", len(kinds), MAX_HEADS)
    ffn_sizes = meta.counts("feed_forward_length", len(kinds), MAX_SIZE)
    sources = _sources(meta, kinds)
    found = []
    for i, kind in enumerate(kinds):
        if num_heads % kv_heads[i]:
            raise ModelFileError(
                f"{meta.source}: {meta.architecture}.attention.head_count is {num_heads}, no multiple of "
                f"head_count_kv {kv_heads[i]} of layer {i}"
            )
        sizes = LayerSizes(kv_heads[i], _head_dim(meta, kind), ffn_sizes[i])
        has_values = f"blk.{i}.attn_v.weight" in file.tensors
        is_own = sources[i] is None
        found.append(
            replace(kind, sizes=sizes, keys_of=sources[i], values_are_keys=is_own and not has_values)
        )
    return tuple(found)


def _require(meta: Metadata, file: GGUFFile, kinds: tuple[LayerKind, ...]) -> None:
    meta.count("attention.sliding_window", 1 << 28)
    if not meta.has("attention.sliding_window_pattern"):
        raise ModelFileError(
            f"{meta.source}: required key {meta.architecture}.attention.sliding_window_pattern is missing"
        )
    if any(kind.window is None for kind in kinds) and "rope_freqs.weight" not in file.tensors:
        raise ModelFileError(f"{meta.source}: rope_freqs.weight is missing, by which layers turn")


def _head_dim(meta: Metadata, kind: LayerKind) -> int:
    """Of windowed layers and of the others."""
    suffix = "" if kind.window is None else "_swa"
    length = meta.count(f"attention.key_length{suffix}", MAX_HEAD_DIM)
    if meta.count(f"attention.value_length{suffix}", MAX_HEAD_DIM) != length:
        raise UnsupportedError(
            f"{meta.source}: attention.value_length{suffix} differs from key_length{suffix} {length}"
        )
    return length


def _sources(meta: Metadata, kinds: tuple[LayerKind, ...]) -> list[int | None]:
    """The layer whose keys and values each reads: its own (None), or the last of its window that has some."""
    shared = meta.count("attention.shared_kv_layers", len(kinds), default=0)
    own = len(kinds) - shared
    found: list[int | None] = [None] * own
    last = {kind.window: i for i, kind in enumerate(kinds[:own])}
    for i, kind in enumerate(kinds[own:], own):
        if kind.window not in last:
            raise ModelFileError(
                f"{meta.source}: {meta.architecture}.attention.shared_kv_layers is {shared}: before those is "
                f"no layer with the window of layer {i}, whose keys it could read"
            )
        found.append(last[kind.window])
    return found


def layer_input_size(meta: Metadata) -> int:
    """Features of the embedding that each layer has of its own; 0 = none."""
    return meta.count("embedding_length_per_layer_input", 1 << 16, default=0)
