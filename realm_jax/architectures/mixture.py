"""The experts of a file's model."""

from dataclasses import replace
from typing import Literal

from realm_jax.architectures.facts import Architecture, MoEFacts
from realm_jax.config import MoEConfig
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.gguf import GGUFFile
from realm_jax.metadata import Metadata

MAX_EXPERTS = 1 << 15  # of all layers; each is an entry of the params tree before a tensor is looked at
MAX_SIZE = 1 << 22
SCORES: dict[int, Literal["softmax", "sigmoid"]] = {1: "softmax", 2: "sigmoid"}


def read_moe(arch: Architecture, meta: Metadata, file: GGUFFile, layers: int) -> MoEConfig | None:
    """What the model's experts are; None where it has none."""
    facts = arch.experts
    if not (experts := _count(arch, meta, layers)):
        return None
    assert facts is not None
    used = meta.count("expert_used_count", experts)
    dense_size = 0 if facts.is_beside else meta.count("feed_forward_length", MAX_SIZE, default=0)
    size = (
        meta.count("expert_feed_forward_length", MAX_SIZE, default=dense_size // used)
        if facts.own_size
        else 0
    )
    moe = MoEConfig(
        num_experts=experts,
        num_used=used,
        size=size or dense_size,
        renormalize=facts.renormalize,
        shared_size=_shared_size(facts, meta, size, dense_size),
        gated_shared=facts.gated_shared,
        is_beside=facts.is_beside,
        fused_gate_up=f"blk.{layers - 1}.ffn_gate_up_exps.weight" in file.tensors,
        has_scales=facts.is_beside and f"blk.{layers - 1}.ffn_down_exps.scale" in file.tensors,
    )
    if moe.size == 0:
        raise ModelFileError(
            f"{meta.source}: required key {meta.architecture}.expert_feed_forward_length is missing"
        )
    return _deepseeks(moe, meta, file) if facts.is_deepseeks else moe


def _deepseeks(moe: MoEConfig, meta: Metadata, file: GGUFFile) -> MoEConfig:
    """The experts with what the keys of DeepSeek's models say of their choice."""
    gating = meta.count("expert_gating_func", 1 << 8, default=1)
    if gating not in SCORES:
        raise UnsupportedError(
            f"{meta.source}: {meta.architecture}.expert_gating_func is {gating}; known: 1 softmax, 2 sigmoid"
        )
    return replace(
        moe,
        scores=SCORES[gating],
        has_bias=any(name.endswith(".exp_probs_b.bias") for name in file.tensors),
        groups=_groups(meta, moe.num_experts),
        renormalize=bool(meta.scalar("expert_weights_norm", moe.renormalize)),
        scale=meta.real("expert_weights_scale", above=0.0) if meta.scalar("expert_weights_scale", 0) else 1.0,
    )


def leading_dense(moe: MoEConfig | None, meta: Metadata, layers: int) -> int:
    """How many of the first layers have a plain feed-forward layer though others have experts."""
    if moe is None or moe.is_beside:
        return 0
    return meta.count("leading_dense_block_count", layers, default=0)


def _count(arch: Architecture, meta: Metadata, layers: int) -> int:
    experts = meta.count("expert_count", 1 << 10, default=0)
    if experts and arch.experts is None:
        raise UnsupportedError(
            f"{meta.source}: {meta.architecture}.expert_count is {experts}; 0 is supported"
        )
    if not experts and arch.experts is not None and arch.experts.always:
        raise ModelFileError(f"{meta.source}: {meta.architecture}.expert_count is 0; it must be at least 1")
    if experts * layers > MAX_EXPERTS:
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.expert_count {experts:,} in {layers:,} layers; "
            f"the limit is {MAX_EXPERTS:,} in all"
        )
    return experts


def _groups(meta: Metadata, experts: int) -> tuple[int, int] | None:
    """All groups of experts and those used."""
    groups = meta.count("expert_group_count", experts, default=0)
    if groups <= 1:
        return None
    used = meta.count("expert_group_used_count", groups, default=groups)
    if experts % groups or experts // groups < 2:
        raise ModelFileError(
            f"{meta.source}: {meta.architecture}.expert_count is {experts}; {groups} groups need a multiple, "
            "at least 2 in each"
        )
    return None if used == groups else (groups, used)


def _shared_size(facts: MoEFacts, meta: Metadata, size: int, dense_size: int) -> int:
    """Features of the shared expert, said outright or as a number of experts' sizes; 0 = there is none."""
    if facts.is_beside:
        return 0
    if facts.is_deepseeks:
        return size * meta.count("expert_shared_count", 1 << 10, default=0)
    default = dense_size if facts.gated_shared else 0
    return meta.count("expert_shared_feed_forward_length", MAX_SIZE, default=default)
