"""Where the modules of Hugging Face's models stand in a GGUF file.

A module's rows may be rows of a larger tensor, or be spread over several: models with fused projections
(phi3) have attn_qkv and gate + up in ffn_up, others the parts. Rows of q and k are ordered differently where
rope turns neighbouring pairs; norms of Gemma 1 to 3 stand in the file with 1 added.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import gguf
import numpy as np

from realm_jax.lora.adapter import Base

Q, K, V, QKV = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"
GATE, UP, GATE_UP = "mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"
FUSED = {QKV: (Q, K, V), GATE_UP: (GATE, UP)}
LINEAR = (Q, K, V, QKV, "self_attn.o_proj", GATE, UP, GATE_UP, "mlp.down_proj", "block_sparse_moe.gate")
NORMS = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm")
NORMS += ("post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")
LAYER_NAME = re.compile(r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,5})\.(?P<part>.+)")
SHIFTED = ("gemma", "gemma2", "gemma3")
"""Architectures whose factors of norms are less by 1 in Hugging Face's files."""
EMBEDDING, NORM, HEAD = "model.embed_tokens", "model.norm", "lm_head"
EXPERTS = ("mlp.experts.", "block_sparse_moe.experts.", "mlp.switch_mlp.")


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor of the base; those of one module, or a run of them.

    heads: None, or the heads whose rows the file has in the order of neighbouring pairs.
    """

    tensor: str  # without .weight or .bias
    first: int
    count: int
    heads: int | None = None

    def to_file(self, rows: np.ndarray) -> np.ndarray:
        """The module's rows in the file's order."""
        return self._turned(rows, 2, 1) if self.heads else rows

    def to_module(self, rows: np.ndarray) -> np.ndarray:
        """The file's rows in the module's order."""
        return self._turned(rows, 1, 2) if self.heads else rows

    def _turned(self, rows: np.ndarray, halves: int, pairs: int) -> np.ndarray:
        """A module has the first elements of a head's pairs, then the second ones; the file, pair by pair."""
        assert self.heads is not None
        half = len(rows) // self.heads // 2
        split = (self.heads, 2, half) if halves == 2 else (self.heads, half, 2)
        return rows.reshape(*split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class Layout:
    """The modules of one base, by the names that PEFT uses: model.layers.0.self_attn.q_proj."""

    base: Base

    def rows(self, module: str) -> tuple[Rows, ...]:
        """Where the module's rows stand, in its order; () if the base has no such module."""
        if module in (EMBEDDING, NORM, HEAD):
            return self._whole(module)
        found = LAYER_NAME.fullmatch(module)
        if found is None or int(found["layer"]) >= self.base.config.num_layers:
            return ()
        layer, part = int(found["layer"]), found["part"]
        if part in NORMS:
            return self._whole(part, layer)
        if part not in LINEAR:
            return ()
        runs = [self._part(layer, each) for each in FUSED.get(part, (part,))]
        return tuple(rows for rows in runs if rows) if all(runs) else ()

    def _part(self, layer: int, part: str) -> Rows | None:
        """Where the rows of one projection stand: in a fused tensor, if the base has that."""
        for whole, parts in FUSED.items():
            if part in parts and (tensor := self._fused(layer, whole)) is not None:
                counts = [self._count(each) for each in parts]
                at = parts.index(part)
                return Rows(tensor, sum(counts[:at]), counts[at])
        rows = self._whole(part, layer)
        if not rows or part not in (Q, K) or not self.base.config.has_reordered_heads:
            return rows[0] if rows else None
        heads = self.base.config.num_heads if part == Q else self.base.config.num_kv_heads
        if rows[0].count != heads * self.base.config.head_dim or self.base.config.head_dim % 2:
            return None
        return Rows(rows[0].tensor, 0, rows[0].count, heads)

    def _fused(self, layer: int, whole: str) -> str | None:
        """The layer's tensor that holds the fused projection, without .weight."""
        if self.base.config.layers[layer].delta_net is not None and whole == QKV:
            return None  # its attn_qkv is no attention's
        tensor = f"blk.{layer}.{'attn_qkv' if whole == QKV else 'ffn_up'}"
        shape = self.base.shapes.get(f"{tensor}.weight", ())
        rows = sum(self._count(part) for part in FUSED[whole])
        is_parted = f"blk.{layer}.ffn_gate.weight" in self.base.shapes and whole == GATE_UP
        return tensor if len(shape) == 2 and shape[0] == rows and not is_parted else None

    def _count(self, part: str) -> int:
        c = self.base.config
        return {Q: c.num_heads * c.head_dim, GATE: c.ffn_size, UP: c.ffn_size}.get(
            part, c.num_kv_heads * c.head_dim
        )

    def _whole(self, name: str, layer: int | None = None) -> tuple[Rows, ...]:
        """All rows of the tensor that has this name in gguf's own table."""
        names = _tensor_names(self.base.config.architecture)
        tensor = names.get_name(name if layer is None else f"model.layers.0.{name}")
        if name == HEAD:
            tensor = "output"  # a Gemma's head is always tied, so gguf's table lacks it
        if tensor is None:
            return ()
        tensor = tensor.replace("blk.0.", f"blk.{layer}.")
        shape = self.base.shapes.get(f"{tensor}.weight")
        return (Rows(tensor, 0, shape[0]),) if shape else ()

    def shape(self, module: str) -> tuple[int, ...] | None:
        """The shape of the module's weight; None if the base has no such module."""
        if not (rows := self.rows(module)):
            return None
        whole = self.base.shapes[f"{rows[0].tensor}.weight"]
        return (sum(each.count for each in rows), *whole[1:])

    def linear(self, *, fused: Sequence[str]) -> Iterator[str]:
        """The projections of all layers, in the spelling that fuses these."""
        absent = {part for whole in fused for part in FUSED[whole]} | (FUSED.keys() - set(fused))
        for layer in range(self.base.config.num_layers):
            names = [f"model.layers.{layer}.{part}" for part in LINEAR if part not in absent]
            yield from (name for name in names if self.rows(name))

    def fused(self) -> list[str]:
        """The fused projections that the base has."""
        return [whole for whole in FUSED if self._fused(0, whole) is not None]

    def norms(self) -> Iterator[str]:
        for layer in range(self.base.config.num_layers):
            names = [f"model.layers.{layer}.{part}" for part in NORMS]
            yield from (name for name in names if self.rows(name))
        yield NORM

    def offset(self, module: str) -> float:
        """What the file adds to the module's weight."""
        is_shifted = self.base.config.architecture in SHIFTED
        return 1.0 if is_shifted and module.endswith("norm") else 0.0


@cache
def _tensor_names(architecture: str) -> gguf.TensorNameMap:
    """The names of a model of one layer."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, 1)
