"""GGUF architectures as data: which metadata and tensors each has, and what they mean.

An entry of `ARCHITECTURES` states facts; `read_config` and `parameters` apply them to a file.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from realm_jax.config import Activation, DeltaNetConfig, LayerKind, ModelConfig, MoEConfig, RopeConfig
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.gguf import GGUFFile
from realm_jax.hybrid_metadata import hybrid_kinds
from realm_jax.metadata import Metadata

MAX_EXPERTS = 1 << 15  # of all layers; each is an entry of the params tree before a tensor is looked at


@dataclass(frozen=True)
class Architecture:
    """Facts that metadata does not state.

    local_rope_base: windowed layers rotate with a base of their own, unscaled, unless a key says else.
    window_pattern: layer % n < n - 1 is windowed; None = `sliding_window` is ignored.
    scale_by_width: (num_layers, ...) whose attention scale is (hidden / heads)**-0.5, as in 27B Gemmas.
    value_heads: of gated delta nets, whose value heads are "tiled" over the key heads or "grouped" by them.
    mlp_norm: what the norm before the feed-forward layer is called.
    """

    interleaved_rope: bool = False
    activation: Activation = Activation.SILU
    fused: bool = False  # attn_qkv and gate + up in ffn_up
    biased: bool = False  # q, k and v have biases
    qk_norm: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    window_pattern: int | None = None
    window: int = 0  # where no key says; 0 = no window
    local_rope_base: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_by_width: tuple[int, ...] = ()
    experts: bool = False
    value_heads: Literal["tiled", "grouped"] | None = None
    mlp_norm: str = "ffn_norm"


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(interleaved_rope=True, experts=True),
    "qwen2": Architecture(biased=True),
    "qwen3": Architecture(qk_norm=True),
    "gemma2": Architecture(
        activation=Activation.GELU,
        post_norms=True,
        scaled_embedding=True,
        window_pattern=2,
        window=4096,
        attention_softcap=50.0,
        logit_softcap=30.0,
        scale_by_width=(46,),
    ),
    "gemma3": Architecture(
        activation=Activation.GELU,
        qk_norm=True,
        post_norms=True,
        scaled_embedding=True,
        window_pattern=6,
        local_rope_base=10000.0,
        scale_by_width=(62,),
    ),
    "phi3": Architecture(fused=True),
    "qwen35": Architecture(qk_norm=True, value_heads="tiled", mlp_norm="post_attention_norm"),
}


def read_config(file: GGUFFile) -> ModelConfig:
    """The facts of the model in a file.

    Raises ModelFileError with every missing or wrong key, UnsupportedError for an unknown architecture.
    """
    source = file.path.name
    meta = Metadata(file.metadata, source)
    name = meta.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{source}: general.architecture is {name!r}; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    arch = ARCHITECTURES[name]
    heads = meta.count("attention.head_count", 1 << 14)
    hidden = meta.count("embedding_length", 1 << 20)
    unused = meta.count("nextn_predict_layers", 16, default=0)
    layers = meta.count("block_count", max(1, len(file.tensors))) - unused  # each layer has tensors
    if layers < 1:
        raise ModelFileError(f"{source}: {name}.nextn_predict_layers is {unused}, all of block_count")
    key_length = meta.count("attention.key_length", 1 << 14, default=_head_dim(hidden, heads, meta))
    if meta.count("attention.value_length", 1 << 14, default=key_length) != key_length:
        raise UnsupportedError(f"{source}: attention.value_length differs from key_length {key_length}")
    kv_heads = meta.count("attention.head_count_kv", 1 << 14, default=heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"{source}: {name}.attention.head_count is {heads}, no multiple of head_count_kv {kv_heads}"
        )
    kinds = _layer_kinds(arch, meta, layers)
    wide = layers in arch.scale_by_width
    return ModelConfig(
        architecture=name,
        vocab_size=meta.vocabulary_size(),
        context_length=meta.count("context_length", 1 << 28),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=key_length,
        ffn_size=meta.count("feed_forward_length", 1 << 22),
        norm_eps=meta.real("attention.layer_norm_rms_epsilon", above=0.0),
        ropes=tuple(_ropes(arch, meta, key_length, kinds)),
        layers=kinds,
        activation=arch.activation,
        attention_scale=(hidden / heads if wide else key_length) ** -0.5,
        attention_softcap=meta.softcap("attn_logit_softcapping", arch.attention_softcap),
        logit_softcap=meta.softcap("final_logit_softcapping", arch.logit_softcap),
        embedding_scale=hidden**0.5 if arch.scaled_embedding else 1.0,
        qk_norm=arch.qk_norm,
        post_norms=arch.post_norms,
        moe=_moe(arch, meta),
        unused_layers=unused,
    )


def _head_dim(hidden: int, heads: int, meta: Metadata) -> int:
    if hidden % heads and not meta.has("attention.key_length"):
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.embedding_length is {hidden}, no multiple of "
            f"attention.head_count {heads}"
        )
    return hidden // heads


def _moe(arch: Architecture, meta: Metadata) -> MoEConfig | None:
    experts = meta.count("expert_count", 1 << 10, default=0)
    if not experts:
        return None
    if not arch.experts:
        raise UnsupportedError(
            f"{meta.source}: {meta.architecture}.expert_count is {experts}; 0 is supported"
        )
    layers = meta.count("block_count", 1 << 12)
    if experts * layers > MAX_EXPERTS:
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.expert_count {experts:,} in {layers:,} layers; "
            f"the limit is {MAX_EXPERTS:,} in all"
        )
    return MoEConfig(experts, meta.count("expert_used_count", experts))


def _layer_kinds(arch: Architecture, meta: Metadata, layers: int) -> tuple[LayerKind, ...]:
    if arch.value_heads is not None:
        return hybrid_kinds(meta, layers, is_grouped=arch.value_heads == "grouped")
    if arch.window_pattern is None:
        return (LayerKind(),) * layers
    window = meta.count("attention.sliding_window", 1 << 28, default=arch.window)
    if not window:
        return (LayerKind(),) * layers
    local = LayerKind(window, "local" if arch.local_rope_base else "global")
    windowed = meta.window_layers(layers, arch.window_pattern)
    return tuple(local if is_windowed else LayerKind() for is_windowed in windowed)


def _ropes(
    arch: Architecture, meta: Metadata, head_dim: int, kinds: tuple[LayerKind, ...]
) -> Iterator[tuple[str, RopeConfig]]:
    dims = meta.count("rope.dimension_count", head_dim, default=head_dim)
    if dims % 2:
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.rope.dimension_count is {dims}; it must be even"
        )
    base = meta.real("rope.freq_base", default=10000.0, above=1.0)
    scaling, factor = meta.rope_scaling()
    original = meta.count(
        "rope.scaling.original_context_length", 1 << 28, default=meta.count("context_length", 1 << 28)
    )
    magnitude = meta.real("rope.scaling.attn_factor", default=1.0, above=0.0)
    if scaling == "yarn":
        magnitude *= 1.0 + 0.1 * math.log(factor)
    yield "global", RopeConfig(dims, base, arch.interleaved_rope, scaling, factor, original, magnitude)
    if any(kind.rope == "local" for kind in kinds):
        local_base = meta.real("rope.freq_base_swa", default=arch.local_rope_base, above=1.0)
        yield "local", RopeConfig(dims, local_base, arch.interleaved_rope)


@dataclass(frozen=True)
class Part:
    """A GGUF tensor, or one expert's slice of it, and the shape it must have."""

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    suffix: str = ".weight"

    @property
    def tensor(self) -> str:
        """The whole name of the tensor."""
        return self.name + self.suffix


@dataclass(frozen=True)
class Parameter:
    """A place in the params tree and the tensors, stacked along their outputs, that fill it."""

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    is_vector: bool = False
    optional: bool = False
    has_bias: bool = False  # one that must be there; others may


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order in which the layers use them."""
    D, V = config.hidden_size, config.vocab_size
    found = [Parameter(("embedding",), (Part("token_embd", (V, D)),))]
    for i in range(config.num_layers):
        found += _layer_parameters(config, i)
    found.append(Parameter(("norm", "scale"), (Part("output_norm", (D,)),), is_vector=True))
    found.append(Parameter(("head",), (Part("output", (V, D)),), optional=True))
    return found


def _layer_parameters(c: ModelConfig, index: int) -> Iterator[Parameter]:
    arch = ARCHITECTURES[c.architecture]
    D, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim

    def at(*path: str) -> tuple[str, ...]:
        return (f"layer_{index}", *path)

    def part(name: str, *shape: int) -> Part:
        return Part(f"blk.{index}.{name}", shape)

    def norm(path: str, name: str, size: int = D) -> Parameter:
        return Parameter(at(*path.split("/"), "scale"), (part(name, size),), is_vector=True)

    yield norm("attention_norm", "attn_norm")
    if (net := c.layers[index].delta_net) is not None:
        yield from _delta_net(c, net, at, part)
        yield norm("mlp_norm", arch.mlp_norm)
        yield from _feed_forward(c, arch.fused, at, part)
        return
    q_rows = 2 * q if c.layers[index].is_gated else q  # each head's query, then its gate
    separate = (part("attn_q", q_rows, D), part("attn_k", kv, D), part("attn_v", kv, D))
    yield Parameter(
        at("attention", "qkv", "kernel"),
        (part("attn_qkv", q + 2 * kv, D),) if arch.fused else separate,
        has_bias=arch.biased,
    )
    if c.qk_norm:
        yield norm("attention/q_norm", "attn_q_norm", c.head_dim)
        yield norm("attention/k_norm", "attn_k_norm", c.head_dim)
    yield Parameter(at("attention", "out", "kernel"), (part("attn_output", D, q),))
    yield norm("mlp_norm", arch.mlp_norm)
    if c.post_norms:
        yield norm("attention_post_norm", "post_attention_norm")
        yield norm("mlp_post_norm", "post_ffw_norm")
    yield from _feed_forward(c, arch.fused, at, part)


def _delta_net(
    c: ModelConfig, net: DeltaNetConfig, at: Callable[..., tuple[str, ...]], part: Callable[..., Part]
) -> Iterator[Parameter]:
    D, H = c.hidden_size, net.value_heads

    def vector(path: str, name: str, shape: tuple[int, ...], suffix: str = ".weight") -> Parameter:
        whole = replace(part(name, *shape), suffix=suffix)
        return Parameter(at("delta_net", *path.split("/")), (whole,), is_vector=True)

    into = (
        part("attn_qkv", net.channels, D),
        part("attn_gate", net.values, D),
        part("ssm_beta", H, D),
        part("ssm_alpha", H, D),
    )
    yield Parameter(at("delta_net", "in", "kernel"), into)
    yield vector("taps", "ssm_conv1d", (net.channels, net.taps))
    yield vector("rate", "ssm_a", (H,), "")
    yield vector("rate_bias", "ssm_dt", (H,), ".bias")
    yield vector("norm/scale", "ssm_norm", (net.head_dim,))
    yield Parameter(at("delta_net", "out", "kernel"), (part("ssm_out", D, net.values),))


def _feed_forward(
    c: ModelConfig, fused: bool, at: Callable[..., tuple[str, ...]], part: Callable[..., Part]
) -> Iterator[Parameter]:
    D, F = c.hidden_size, c.ffn_size
    if c.moe is None:
        gate_up = (part("ffn_up", 2 * F, D),) if fused else (part("ffn_gate", F, D), part("ffn_up", F, D))
        yield Parameter(at("mlp", "gate_up", "kernel"), gate_up)
        yield Parameter(at("mlp", "down", "kernel"), (part("ffn_down", D, F),))
        return
    E = c.moe.num_experts
    yield Parameter(at("mlp", "router", "kernel"), (part("ffn_gate_inp", E, D),))
    for e in range(E):

        def mine(name: str, out: int, into: int, e: int = e) -> Part:
            whole = part(name, E, out, into)
            return Part(whole.name, whole.shape, e)

        yield Parameter(
            at("mlp", "experts", "gate_up", str(e)), (mine("ffn_gate_exps", F, D), mine("ffn_up_exps", F, D))
        )
        yield Parameter(at("mlp", "experts", "down", str(e)), (mine("ffn_down_exps", D, F),))
