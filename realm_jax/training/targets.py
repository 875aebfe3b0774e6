"""Which matrices an adapter changes, what it starts from, and the params with it.

I inputs, O outputs, R rank.
"""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from realm_jax.architectures import Parameter, Part, parameters
from realm_jax.config import ModelConfig
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.lora import Adapter, LowRank
from realm_jax.lora.nodes import Adapted, Change, Delta
from realm_jax.training.settings import TrainingConfig
from realm_jax.weights import Params

NAMES = {
    "attn_q": ("q", "q_proj"),
    "attn_k": ("k", "k_proj"),
    "attn_v": ("v", "v_proj"),
    "attn_qkv": ("qkv", "qkv_proj"),
    "attn_output": ("o", "o_proj"),
    "ffn_gate": ("gate", "gate_proj"),
    "ffn_up": ("up", "up_proj", "gate_up", "gate_up_proj"),
    "ffn_down": ("down", "down_proj"),
}
"""What else the last part of a GGUF tensor's name is called: for short, and by Hugging Face."""

Factors = dict[str, dict[str, jax.Array]]
"""What is trained: by GGUF tensor, a [R, I] and b [O, R] in float32."""


@struct.dataclass
class DroppedDelta:
    """A change that misses a share of its inputs, others each time (Srivastava et al. 2014)."""

    delta: Delta
    key: jax.Array
    share: float = struct.field(pytree_node=False)

    def of(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead P"]:
        """As `Delta.of`, of the inputs that are left."""
        kept = jax.random.bernoulli(self.key, 1 - self.share, x.shape)
        return self.delta.of(jnp.where(kept, x / (1 - self.share), 0.0))

    def rows(self, ids: Int[Array, "*lead"]) -> Float[Array, "*lead I"]:
        """As `Delta.rows`: there are no inputs to miss."""
        return self.delta.rows(ids)


def chosen_parts(config: ModelConfig, targets: Collection[str]) -> dict[str, Part]:
    """The matrices that the names mean, by GGUF tensor.

    Raises RequestError for a name that the model lacks, UnsupportedError for matrices of experts.
    """
    layers = [p for p in parameters(config) if p.path[0].startswith("layer_") and not p.is_vector]
    trainable = {_kind(part) for p in layers for part in p.parts if _kind(part) in NAMES}
    wanted: set[str] = set()
    for target in targets:
        kinds = trainable if target == "all" else {k for k in trainable if target in (k, *NAMES[k])}
        if not kinds:
            known = ", ".join(NAMES[kind][0] for kind in NAMES if kind in trainable)
            raise RequestError(f"target {target!r} is no matrix of this model; it has {known}, or all")
        wanted |= kinds
    if config.moe is not None and "all" in targets:
        raise UnsupportedError("experts cannot be trained yet; name other targets, such as q,k,v,o")
    return {f"{part.name}.weight": part for p in layers for part in p.parts if _kind(part) in wanted}


def _kind(part: Part) -> str:
    return part.name.rpartition(".")[2]


def initial_factors(parts: Mapping[str, Part], rank: int, seed: int) -> Factors:
    """Factors whose change is zero: a is Kaiming-uniform with a gain of 1/3 in variance, b is zero, as PEFT
    begins (`kaiming_uniform_(a, a=sqrt(5))`: within 1 / sqrt(I))."""
    rng = np.random.default_rng(seed)
    factors: Factors = {}
    for name, part in parts.items():
        out, into = part.shape
        bound = into**-0.5
        a = rng.uniform(-bound, bound, (rank, into)).astype(np.float32)
        factors[name] = {"a": jnp.asarray(a), "b": jnp.zeros((out, rank), jnp.float32)}
    return factors


def adapted(params: Params, config: ModelConfig, changes: Mapping[str, Change]) -> Params:
    """The params with these changes, by GGUF tensor; all else is shared."""
    tree = params
    for parameter in parameters(config):
        found = tuple(changes.get(f"{part.name}.weight") for part in parameter.parts)
        if any(change is not None for change in found):
            widths = tuple(part.shape[-2] for part in parameter.parts)
            node = Adapted(_at(params, parameter), found, widths)
            tree = _replaced(tree, parameter.path, node)
    return tree


def _at(params: Params, parameter: Parameter) -> Any:
    node: Any = params
    for name in parameter.path:
        node = node[name]
    return node


def _replaced(tree: Params, path: tuple[str, ...], node: Any) -> Params:
    first, *rest = path
    return {**tree, first: _replaced(tree[first], tuple(rest), node) if rest else node}


def deltas(factors: Factors, scale: float) -> dict[str, Change]:
    """The changes that the factors make."""
    return {name: Delta(f["a"], f["b"], jnp.float32(scale)) for name, f in factors.items()}


def dropped_deltas(factors: Factors, scale: float, share: float, key: Array) -> dict[str, Change]:
    """The changes that the factors make while they are trained: each misses inputs of its own."""
    if not share:
        return deltas(factors, scale)
    keys = jax.random.split(key, len(factors))
    return {
        name: DroppedDelta(Delta(f["a"], f["b"], jnp.float32(scale)), each, share)
        for (name, f), each in zip(factors.items(), keys, strict=True)
    }


def as_adapter(factors: Factors, config: TrainingConfig, name: str) -> Adapter:
    """The factors as files hold them."""
    return Adapter(
        name,
        {
            tensor: LowRank(np.asarray(f["a"]), np.asarray(f["b"]), config.scale)
            for tensor, f in factors.items()
        },
    )
