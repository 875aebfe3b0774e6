"""Which type each tensor gets in a file of a given type: llama.cpp's mixes (src/llama-quant.cpp).

Some tensors lose more than others by rounding: values of attention, what returns from the feed-forward
layer, the head. Mixes give these more bits, in some layers or in all.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.gguf import TensorInfo
from realm_jax.metadata import Metadata
from realm_jax.quantization.file_types import PLAIN, FileType, is_quantizable

T = GGMLType


class Role(Enum):
    """What a tensor does, as far as mixes care."""

    HEAD = auto()
    EMBEDDING = auto()
    ATTENTION_V = auto()  # also where it is fused with others
    ATTENTION_K = auto()
    ATTENTION_OUTPUT = auto()
    FFN_DOWN = auto()
    OTHER = auto()


ROLES = {
    "attn_qkv.weight": Role.ATTENTION_V,
    "attn_kv_b.weight": Role.ATTENTION_V,
    "attn_v.weight": Role.ATTENTION_V,
    "attn_k.weight": Role.ATTENTION_K,
    "attn_output.weight": Role.ATTENTION_OUTPUT,
    "ffn_down": Role.FFN_DOWN,
}


@dataclass(frozen=True)
class Facts:
    """What a mix needs to know of a model."""

    architecture: str
    layers: int
    experts: int
    queries_per_kv: int
    is_70b: bool  # one kv head for eight queries: its attn_v is small, so more bits are cheap
    is_tied: bool
    has_importance: bool

    @staticmethod
    def of(
        metadata: Mapping[str, Any], names: Iterable[str], source: str, *, has_importance: bool
    ) -> "Facts":
        """From a file's metadata. Raises ModelFileError where a key is missing or out of range."""
        meta = Metadata(metadata, source)
        layers = meta.count("block_count", 1 << 12)
        heads = _first(meta, metadata, "attention.head_count", 1)
        kv_heads = _first(meta, metadata, "attention.head_count_kv", heads)
        return Facts(
            architecture=str(meta.architecture),
            layers=layers,
            experts=meta.count("expert_count", 1 << 12, default=0),
            queries_per_kv=heads // kv_heads if kv_heads else 0,
            is_70b=meta.architecture == "llama" and layers == 80 and heads != kv_heads,
            is_tied="output.weight" not in set(names),
            has_importance=has_importance,
        )


def _first(meta: Metadata, metadata: Mapping[str, Any], key: str, default: int) -> int:
    """A number that may differ between layers: that of the first."""
    value = metadata.get(f"{meta.architecture}.{key}")
    if isinstance(value, np.ndarray) and value.size and np.issubdtype(value.dtype, np.integer):
        return max(0, int(value[0]))
    return meta.count(key, 1 << 14, default=default) if meta.has(key) else default


@dataclass(frozen=True)
class Place:
    """Where among its like a tensor stands: the `index`th of `count`, which is mostly its layer."""

    facts: Facts
    index: int
    count: int

    def has_more_bits(self) -> bool:
        """Among the half of the layers where the `_M` mixes spend more: the ends, and each third between."""
        n = self.count
        return self.index < n // 8 or self.index >= 7 * n // 8 or (self.index - n // 8) % 3 == 2

    def is_before(self, index: int) -> bool:
        return self.index < index

    def is_in_first(self, share: int) -> bool:
        return self.index < self.count // share

    def is_shared(self) -> bool:
        """Whether four queries or more have one value: it is small, and errors in it count more."""
        return self.facts.queries_per_kv >= 4

    def is_falcon(self) -> bool:
        return self.facts.architecture == "falcon"

    def has_eight_experts(self) -> bool:
        return self.facts.experts == 8 and not self.is_falcon()

    def is_usual(self) -> bool:
        return not self.is_falcon() and not self.has_eight_experts()


def always(_: Place) -> bool:
    return True


Rule = tuple[str, Callable[[Place], bool], GGMLType]
"""Names of file types, when it holds, the type. Of a role's rules the first that holds counts."""

VALUE_RULES: tuple[Rule, ...] = (
    ("Q2_K", Place.is_shared, T.Q4_K),
    ("Q2_K", always, T.Q3_K),
    ("Q2_K_S", Place.is_shared, T.Q4_K),
    ("Q3_K_M", lambda at: at.is_before(2), T.Q5_K),
    ("Q3_K_M", always, T.Q4_K),
    ("Q3_K_L", always, T.Q5_K),
    ("IQ4_NL", Place.is_shared, T.Q5_K),
    ("Q4_K_M Q5_K_M", Place.has_more_bits, T.Q6_K),
    ("Q4_K_S", lambda at: at.is_before(4), T.Q5_K),
)
OUTPUT_RULES: tuple[Rule, ...] = (
    ("Q3_K_L", Place.is_falcon, T.Q4_K),
    ("Q2_K Q3_K_S Q3_K_M IQ4_NL Q4_K_S Q4_K_M", Place.has_eight_experts, T.Q5_K),
    ("Q2_K", Place.is_usual, T.Q3_K),
    ("Q3_K_M", Place.is_usual, T.Q4_K),
    ("Q3_K_L", Place.is_usual, T.Q5_K),
)
DOWN_RULES: tuple[Rule, ...] = (
    ("Q2_K", always, T.Q3_K),
    ("Q2_K_S", lambda at: at.is_in_first(8), T.Q4_K),
    ("Q3_K_M", lambda at: at.is_in_first(16), T.Q5_K),
    ("Q3_K_M", lambda at: not at.is_falcon() or at.has_more_bits(), T.Q4_K),
    ("Q3_K_L", Place.is_falcon, T.Q4_K),
    ("Q3_K_L", always, T.Q5_K),
    ("Q4_K_M", lambda at: at.is_falcon() and at.is_in_first(16), T.Q6_K),
    ("Q4_K_M", lambda at: at.is_falcon() and at.has_more_bits(), T.Q5_K),
    ("Q4_K_M", lambda at: at.has_more_bits() and not at.is_falcon(), T.Q6_K),
    ("Q5_K_M", Place.has_more_bits, T.Q6_K),
    ("Q4_K_S", lambda at: at.is_in_first(8) and not at.is_falcon(), T.Q5_K),
    ("IQ4_NL", lambda at: at.is_in_first(8) and not at.facts.has_importance, T.Q5_K),
    # where 4 and 5 bits around zero go astray even with importance
    ("Q4_0", lambda at: at.is_in_first(8) and at.facts.has_importance, T.Q4_1),
    ("Q5_0", lambda at: at.is_in_first(8) and at.facts.has_importance, T.Q5_1),
)
RULES = {Role.ATTENTION_V: VALUE_RULES, Role.ATTENTION_OUTPUT: OUTPUT_RULES, Role.FFN_DOWN: DOWN_RULES}


@dataclass(frozen=True)
class Mix:
    """The types of all tensors of a model."""

    file_type: FileType
    facts: Facts
    head: GGMLType | None = None  # asked for; also of an embedding that is the head
    embedding: GGMLType | None = None
    is_pure: bool = False

    def types(self, tensors: Iterable[TensorInfo]) -> dict[str, GGMLType]:
        """The type that each tensor should have, before the length of its rows is looked at."""
        ordered = sorted(tensors, key=lambda info: (_layer(info.name), info.name))
        values = [info.name for info in ordered if _role(info.name) is Role.ATTENTION_V]
        downs = [i.name for i in ordered if _role(i.name) is Role.FFN_DOWN and is_quantizable(i)]
        index = {name: number for names in (values, downs) for number, name in enumerate(names)}
        found: dict[str, GGMLType] = {}
        for info in ordered:
            is_down = _role(info.name) is Role.FFN_DOWN
            number = _layer(info.name) if is_down and self.facts.experts > 1 else index.get(info.name, 0)
            place = Place(self.facts, number, self.facts.layers if is_down else len(values))
            found[info.name] = self._type(info, place) if is_quantizable(info) else info.ggml_type
        return found

    def _type(self, info: TensorInfo, place: Place) -> GGMLType:
        role, kind = _role(info.name), self.file_type.kind
        is_head = role is Role.HEAD or (role is Role.EMBEDDING and self.facts.is_tied)
        asked = self.embedding if role is Role.EMBEDDING else None
        asked = self.head if asked is None and is_head else asked
        if asked is not None:
            return asked
        if self.is_pure or kind in PLAIN:
            return kind
        if is_head:
            return self._head(info.shape[-1])
        if kind is T.MXFP4:
            is_expert = len(info.shape) > 2 and info.shape[-3] > 1
            return kind if is_expert or self.file_type.is_uniform else T.Q8_0
        return self._by_rules(role, place)

    def _head(self, inputs: int) -> GGMLType:
        kind = self.file_type.kind
        is_odd = inputs % BLOCK_SIZES[kind].elements or self.facts.architecture == "falcon"
        return T.Q8_0 if is_odd or kind in (T.Q8_0, T.MXFP4) else T.Q6_K

    def _by_rules(self, role: Role, place: Place) -> GGMLType:
        f, name = self.facts, self.file_type.name
        if role in (Role.ATTENTION_V, Role.ATTENTION_K) and f.experts == 8:
            return T.Q8_0
        holding = (
            kind for names, holds, kind in RULES.get(role, ()) if name in names.split() and holds(place)
        )
        kind = next(holding, self.file_type.kind)
        is_small = role is Role.ATTENTION_V and f.is_70b and kind in (T.Q3_K, T.Q4_K)
        return T.Q5_K if is_small else kind


def _role(name: str) -> Role:
    if name == "output.weight":
        return Role.HEAD
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return Role.EMBEDDING
    return next((role for part, role in ROLES.items() if part in name), Role.OTHER)


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d{1,6})\.", name)
    return int(match[1]) if match else -1
