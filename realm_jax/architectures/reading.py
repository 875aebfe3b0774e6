"""What a file's metadata says of its model."""

from realm_jax.architectures.facts import Architecture
from realm_jax.architectures.heads import read_heads
from realm_jax.architectures.mixture import MAX_SIZE, leading_dense, read_moe
from realm_jax.architectures.rotary import layer_kinds, read_ropes, yarn_score_factor
from realm_jax.architectures.table import ARCHITECTURES
from realm_jax.architectures.varied import layer_input_size, varied_kinds
from realm_jax.config import ModelConfig, MoEConfig, QKNorm, Temperature
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.gguf import GGUFFile
from realm_jax.metadata import Metadata


def read_config(file: GGUFFile) -> ModelConfig:
    """The facts of the model in a file.

    Raises ModelFileError with every missing or wrong key, UnsupportedError for an unknown architecture.
    """
    meta = Metadata(file.metadata, file.path.name)
    name = meta.architecture
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{meta.source}: general.architecture is {name!r}; supported: {', '.join(sorted(ARCHITECTURES))}"
        )
    arch = ARCHITECTURES[name]
    hidden = meta.count("embedding_length", 1 << 20)
    unused = meta.count("nextn_predict_layers", 16, default=0)
    layers = meta.count("block_count", max(1, len(file.tensors))) - unused  # each layer has tensors
    if layers < 1:
        raise ModelFileError(f"{meta.source}: {name}.nextn_predict_layers is {unused}, all of block_count")
    heads = read_heads(arch, meta, hidden, layers)
    moe = read_moe(arch, meta, file, layers)
    kinds = layer_kinds(arch, meta, layers, dense=leading_dense(moe, meta, layers))
    kinds = varied_kinds(meta, file, heads.num_heads, kinds) if arch.varied else kinds
    score_width = hidden / heads.num_heads if layers in arch.scale_by_width else heads.score_dim
    has_second_norm = any(f"blk.0.{norm}.weight" in file.tensors for norm in arch.second_norms)
    return ModelConfig(
        architecture=name,
        vocab_size=meta.vocabulary_size(),
        context_length=meta.count("context_length", 1 << 28),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        ffn_size=_ffn_size(arch, meta, layers, moe),
        norm_eps=meta.real(f"attention.{_EPSILON[arch.norm]}", above=0.0),
        ropes=tuple(read_ropes(arch, meta, heads.rope_dim, kinds)),
        layers=kinds,
        activation=arch.activation,
        attention_scale=_attention_scale(arch, meta, score_width),
        attention_softcap=meta.softcap("attn_logit_softcapping", arch.attention_softcap),
        logit_softcap=meta.softcap("final_logit_softcapping", arch.logit_softcap),
        embedding_scale=_scale(arch, meta, "embedding_scale")
        * (hidden**0.5 if arch.scaled_embedding else 1.0),
        residual_scale=_scale(arch, meta, "residual_scale"),
        logit_scale=_logit_scale(arch, meta),
        qk_norm=_qk_norm(arch, file),
        pre_norms=arch.pre_norms,
        post_norms=arch.post_norms,
        parallel=arch.parallel or (bool(arch.second_norms) and not has_second_norm),
        shared_norm=bool(arch.second_norms) and not has_second_norm,
        sinks=arch.sinks,
        unit_values=arch.unit_values,
        layer_input_size=layer_input_size(meta) if arch.varied else 0,
        output_scales=arch.varied and "blk.0.layer_output_scale.weight" in file.tensors,
        learned_positions=arch.learned_positions,
        temperature=_temperature(arch, meta),
        latent=heads.latent,
        has_reordered_heads=arch.interleaved_rope and arch.reordered,
        moe=moe,
        unused_layers=unused,
    )


_EPSILON = {
    "rms": "layer_norm_rms_epsilon",
    "layer": "layer_norm_epsilon",
    "biased layer": "layer_norm_epsilon",
}


def _attention_scale(arch: Architecture, meta: Metadata, width: float) -> float:
    if arch.attention_scale is not None:
        return arch.attention_scale
    if arch.has_scales and meta.scalar("attention.scale", 0):
        return meta.real("attention.scale", above=0.0)
    return width**-0.5 * yarn_score_factor(arch, meta)


def _qk_norm(arch: Architecture, file: GGUFFile) -> QKNorm:
    has_own = arch.own_head_norms and "blk.0.attn_q_norm.weight" in file.tensors
    return QKNorm.EACH_HEAD if has_own else arch.qk_norm


def _ffn_size(arch: Architecture, meta: Metadata, layers: int, moe: MoEConfig | None) -> int:
    """Features of a plain feed-forward layer; of the largest, where they differ."""
    if arch.varied:
        return max(meta.counts("feed_forward_length", layers, MAX_SIZE))
    return meta.count("feed_forward_length", MAX_SIZE, default=moe.size if moe else None)


def _scale(arch: Architecture, meta: Metadata, key: str) -> float:
    """A factor that the file may have; 0 stands for none, as in llama.cpp."""
    return meta.real(key, above=0.0) if arch.has_scales and meta.scalar(key, 0) else 1.0


def _logit_scale(arch: Architecture, meta: Metadata) -> float:
    if arch.logit_scale == "none" or not meta.scalar("logit_scale", 0):
        return 1.0
    scale = meta.real("logit_scale", above=0.0)
    return scale if arch.logit_scale == "multiplies" else 1.0 / scale


def _temperature(arch: Architecture, meta: Metadata) -> Temperature | None:
    key = "attention.temperature_scale"
    if not arch.has_temperature or not meta.scalar(key, 0):
        return None
    length = meta.count(
        "rope.scaling.original_context_length", 1 << 28, default=meta.count("context_length", 1 << 28)
    )
    return Temperature(meta.real(key, above=0.0), length)
