"""The architectures, each by what distinguishes it from llama."""

from dataclasses import replace

from realm_jax.architectures.facts import Architecture, MoEFacts
from realm_jax.config import Activation, QKNorm

_LLAMA = Architecture(interleaved_rope=True, experts=MoEFacts(own_size=False, always=False))
_GRANITE = replace(_LLAMA, has_scales=True, logit_scale="divides")
_GEMMA = Architecture(activation=Activation.GEGLU, scaled_embedding=True)
_COHERE = Architecture(
    interleaved_rope=True,
    reordered=False,
    norm="layer",
    parallel=True,
    second_norms=("ffn_norm",),
    own_head_norms=True,
    logit_scale="multiplies",
)
_QWEN35 = Architecture(qk_norm=QKNorm.HEAD, feed_forward_norm="post_attention_norm", value_heads="tiled")

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral3": replace(_LLAMA, yarn_multiplier=1.0, yarn_betas=True, has_temperature=True),
    "smollm3": Architecture(interleaved_rope=True, rope_on="three of four"),
    "granite": _GRANITE,
    "granitemoe": replace(_GRANITE, experts=MoEFacts(own_size=False)),
    "qwen2": Architecture(biased=True),
    "qwen2moe": Architecture(biased=True, experts=MoEFacts(renormalize=False, gated_shared=True)),
    "qwen3": Architecture(qk_norm=QKNorm.HEAD),
    "qwen3moe": Architecture(qk_norm=QKNorm.HEAD, experts=MoEFacts()),
    "qwen3next": replace(_QWEN35, value_heads="grouped", experts=MoEFacts(gated_shared=True)),
    "qwen35": _QWEN35,
    "qwen35moe": replace(_QWEN35, experts=MoEFacts(gated_shared=True)),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        post_norms=True,
        window_pattern=2,
        window=4096,
        attention_softcap=50.0,
        logit_softcap=30.0,
        scale_by_width=(46,),
    ),
    "gemma3": replace(
        _GEMMA,
        qk_norm=QKNorm.HEAD,
        post_norms=True,
        window_pattern=6,
        local_rope=10000.0,
        scale_by_width=(62,),
    ),
    "gemma4": replace(
        _GEMMA,
        qk_norm=QKNorm.HEAD,
        post_norms=True,
        window_pattern=6,
        local_rope=True,
        attention_scale=1.0,
        unit_values=True,
        varied=True,
        experts=MoEFacts(is_beside=True, always=False),
    ),
    "phi3": Architecture(fused_qkv=True, fused_gate_up=True),
    "olmo2": Architecture(
        qk_norm=QKNorm.PROJECTION, pre_norms=False, post_norms=True, window_pattern=4, local_rope=True
    ),
    "gpt-oss": Architecture(
        activation=Activation.CLAMPED_SWIGLU,
        feed_forward_norm="post_attention_norm",
        window_pattern=2,
        sinks=True,
        experts=MoEFacts(),
    ),
    "command-r": _COHERE,
    "cohere2": replace(_COHERE, rope_on="windows", window_pattern=4),
    "gpt2": Architecture(
        activation=Activation.GELU,
        norm="biased layer",
        fused_qkv=True,
        learned_positions=True,
        rope_on="none",
    ),
    "starcoder2": Architecture(activation=Activation.GELU, norm="biased layer", biased=True),
    "stablelm": Architecture(norm="biased layer", second_norms=("ffn_norm",), own_head_norms=True),
    "falcon": Architecture(
        activation=Activation.GELU,
        norm="biased layer",
        fused_qkv=True,
        parallel=True,
        attention_norm="attn_norm_2",
        feed_forward_norm="attn_norm",
        second_norms=("attn_norm_2",),
    ),
    "deepseek2": Architecture(
        interleaved_rope=True,
        latent=True,
        yarn_multiplier=10.0,
        experts=MoEFacts(renormalize=False, is_deepseeks=True),
    ),
}
