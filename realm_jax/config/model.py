"""Facts of a model, read from its file."""

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Literal


class Activation(StrEnum):
    """What stands between the feed-forward layer's projections; all but GELU gate (Shazeer 2020)."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"
    CLAMPED_SWIGLU = "clamped-swiglu"  # gpt-oss
    GELU = "gelu"

    @property
    def is_gated(self) -> bool:
        return self is not Activation.GELU


class QKNorm(StrEnum):
    """What a norm of queries and keys runs over."""

    NONE = "none"
    HEAD = "head"
    EACH_HEAD = "each head"  # with factors of its own
    PROJECTION = "projection"  # all heads together


@dataclass(frozen=True)
class RopeConfig:
    """How one kind of layer turns positions into angles; no `dims`, no turn."""

    dims: int
    base: float
    interleaved: bool
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original_context: int = 0
    magnitude: float = 1.0  # multiplies cos and sin
    betas: tuple[float, float] = (32.0, 1.0)  # YaRN's: turns that keep and that lose their frequency


@dataclass(frozen=True)
class DeltaNetConfig:
    """The sizes of a gated delta net, whose heads are square.

    taps: of the convolution before it. is_grouped: value heads of one key head are neighbours; else value
    head i has key head i % key_heads.
    """

    key_heads: int
    value_heads: int
    head_dim: int
    taps: int
    is_grouped: bool

    @property
    def values(self) -> int:
        """Features of all value heads."""
        return self.value_heads * self.head_dim

    @property
    def channels(self) -> int:
        """Features that are convolved: queries, keys and values."""
        return 2 * self.key_heads * self.head_dim + self.values


@dataclass(frozen=True)
class LayerSizes:
    """The sizes of a layer, where they differ from layer to layer."""

    num_kv_heads: int
    head_dim: int
    ffn_size: int


@dataclass(frozen=True)
class LayerKind:
    """What distinguishes one layer's arithmetic from another's; never its own index.

    window: a key is visible if query position - key position < window.
    dense: a plain feed-forward layer, whatever the others have.
    is_gated: attention's output passes a gate.
    delta_net: what stands in place of attention.
    sizes: None = the model's.
    keys_of: the earlier layer whose keys and values are read, by a layer that has none.
    values_are_keys: before either is normed and turned.
    """

    window: int | None = None
    rope: str = "global"
    dense: bool = False
    is_gated: bool = False
    delta_net: DeltaNetConfig | None = None
    sizes: LayerSizes | None = None
    keys_of: int | None = None
    values_are_keys: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """A router that picks `num_used` of `num_experts` and weighs them.

    scores: what the router's outputs become before the choice.
    has_bias: each expert has a bias that enters the choice and not the weight.
    groups: (all, used): only experts of the best groups can be chosen; None = of any.
    renormalize: the weights are made to add up to 1; then `scale` multiplies them.
    shared_size: features of the expert that every token goes through; 0 = none.
    gated_shared: what that adds is weighted by a sigmoid.
    is_beside: every layer has a plain feed-forward layer as well, and norms for each of the two.
    fused_gate_up: one tensor has both of these projections. has_scales: each expert's output has a factor.
    """

    num_experts: int
    num_used: int
    size: int  # features of an expert
    scores: Literal["softmax", "sigmoid"] = "softmax"
    has_bias: bool = False
    groups: tuple[int, int] | None = None
    renormalize: bool = True
    scale: float = 1.0
    shared_size: int = 0
    gated_shared: bool = False
    is_beside: bool = False
    fused_gate_up: bool = False
    has_scales: bool = False


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-AI 2024): keys and values are made of one vector a token.

    query_rank: of the projection into queries; 0 = they are projected at once.
    rank: of keys and values. plain_dim, rope_dim: of a head's query and key, unturned and turned.
    is_joined: one tensor has what keys and what values are made by.
    """

    query_rank: int
    rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    is_joined: bool = False


@dataclass(frozen=True)
class Temperature:
    """Queries grow with their position p: by 1 + scale * ln(floor(p / length) + 1)."""

    scale: float
    length: int


@dataclass(frozen=True)
class ModelConfig:
    """Facts of a model, read from its GGUF metadata. Hashable: the static argument of every program.

    num_kv_heads, head_dim: as the cache keeps them. Where layers differ, `of` has their own; here are the
      most heads and features, and the head_dim of layers without a window.
    parallel: attention and feed-forward read the same residual; shared_norm: and the same norm of it.
    unit_values: values are brought to root mean square 1.
    layer_input_size: features of the embedding that each layer has of its own; 0 = none.
    output_scales: each layer's output has a factor.
    has_reordered_heads: rows of q and k stand in pairs that rope turns, in Hugging Face's files in halves.
    """

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
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    qk_norm: QKNorm = QKNorm.NONE
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    sinks: bool = False
    unit_values: bool = False
    layer_input_size: int = 0
    output_scales: bool = False
    learned_positions: bool = False
    temperature: Temperature | None = None
    latent: LatentConfig | None = None
    has_reordered_heads: bool = False
    moe: MoEConfig | None = None
    unused_layers: int = 0  # in the file after the others: heads that draft

    def of(self, kind: LayerKind) -> "ModelConfig":
        """The model as a layer of this kind sees it: with its own sizes."""
        sizes = kind.sizes
        if sizes is None:
            return self
        return replace(
            self, num_kv_heads=sizes.num_kv_heads, head_dim=sizes.head_dim, ffn_size=sizes.ffn_size
        )

    @property
    def has_mlp_norm(self) -> bool:
        """Whether the residual is normed once for the whole feed-forward layer."""
        return self.pre_norms and not (self.moe is not None and self.moe.is_beside)

    @property
    def is_recurrent(self) -> bool:
        """Whether a layer has one state for a whole sequence, which can be neither cut back nor shared."""
        return any(kind.delta_net for kind in self.layers)
