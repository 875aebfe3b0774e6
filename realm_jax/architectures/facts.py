"""What there is to say of an architecture that metadata does not state."""

from dataclasses import dataclass
from typing import Literal

from realm_jax.config import Activation, QKNorm


@dataclass(frozen=True)
class MoEFacts:
    """How an architecture with experts chooses and weighs them.

    renormalize: the weights of the chosen ones are made to add up to 1; a key may say else.
    is_deepseeks: keys for groups of experts and for a factor on their weights are read.
    gated_shared: what the shared expert adds is weighted, token by token.
    is_beside: every layer has a plain feed-forward layer as well, and norms for each of the two.
    own_size: the experts have a size of their own, in `expert_feed_forward_length`.
    always: every file has experts.
    """

    renormalize: bool = True
    is_deepseeks: bool = False
    gated_shared: bool = False
    is_beside: bool = False
    own_size: bool = True
    always: bool = True


@dataclass(frozen=True)
class Architecture:
    """Facts that metadata does not state; the defaults are those of llama with half-split rope.

    reordered: rows of q and k stand in another order than Hugging Face's, where rope is interleaved.
    norm: "layer" subtracts the mean (Ba et al. 2016), "biased layer" adds a bias as well.
    own_head_norms: queries and keys of each head are normed by factors of its own, in files that have these.
    parallel: attention and feed-forward read the same residual.
    attention_norm, feed_forward_norm: the tensors of the norms before these.
    second_norms: in a file without any of these tensors, both read the same norm, and so are parallel.
    has_scales: keys for factors on embeddings, residuals and attention are read.
    has_temperature: and one that makes queries grow with their position.
    rope_on: which layers are turned, where not all are.
    window_pattern: layer % n < n - 1 is windowed; None = `sliding_window` is ignored.
    window: where no key says; 0 = no window.
    local_rope: windowed layers turn by a rope of their own, unscaled; a number: with this base.
    yarn_multiplier: what `rope.scaling.yarn_log_multiplier` is multiplied by; None = it is not read.
    attention_scale: in place of head_dim**-0.5.
    scale_by_width: (num_layers, ...) whose attention scale is (hidden / heads)**-0.5, as in 27B Gemmas.
    unit_values: values are brought to root mean square 1.
    varied: layers differ in size, share keys and values, or have inputs of their own, as keys say.
    value_heads: of gated delta nets, whose value heads are tiled over the key heads or grouped by them.
    logit_scale: whether logits are multiplied or divided by the key of this name.
    """

    interleaved_rope: bool = False
    reordered: bool = True
    activation: Activation = Activation.SWIGLU
    fused_qkv: bool = False
    fused_gate_up: bool = False  # gate and up in ffn_up
    biased: bool = False  # q, k and v have biases
    norm: Literal["rms", "layer", "biased layer"] = "rms"
    qk_norm: QKNorm = QKNorm.NONE
    own_head_norms: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    attention_norm: str = "attn_norm"
    feed_forward_norm: str = "ffn_norm"
    second_norms: tuple[str, ...] = ()
    scaled_embedding: bool = False
    learned_positions: bool = False
    rope_on: Literal["all", "windows", "three of four", "none"] = "all"
    window_pattern: int | None = None
    window: int = 0
    local_rope: float | bool = False
    yarn_multiplier: float | None = None
    yarn_betas: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    attention_scale: float | None = None
    scale_by_width: tuple[int, ...] = ()
    has_scales: bool = False
    has_temperature: bool = False
    logit_scale: Literal["none", "multiplies", "divides"] = "none"
    sinks: bool = False
    unit_values: bool = False
    varied: bool = False
    value_heads: Literal["tiled", "grouped"] | None = None
    latent: bool = False  # keys and values are made of one small vector a token
    experts: MoEFacts | None = None
