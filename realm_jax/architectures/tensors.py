"""The tensors of a model, and where in the params tree each stands."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from realm_jax.architectures.table import ARCHITECTURES
from realm_jax.config import DeltaNetConfig, LatentConfig, LayerKind, ModelConfig, MoEConfig, QKNorm


@dataclass(frozen=True)
class HeadRows:
    """Of the `height` rows that each head has in a matrix, `count` from `first` on."""

    heads: int
    height: int
    first: int
    count: int
    is_transposed: bool


@dataclass(frozen=True)
class Part:
    """A GGUF tensor, or one expert's slice of it, and the shape it must have.

    rows: the rows of it that are meant; None = all.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    suffix: str = "weight"
    rows: HeadRows | None = None

    @property
    def tensor(self) -> str:
        """The whole name of the tensor."""
        return f"{self.name}.{self.suffix}" if self.suffix else self.name


@dataclass(frozen=True)
class Parameter:
    """A place in the params tree and the tensors, stacked along their outputs, that fill it.

    kind: "matrix" is a projection or an embedding, "heads" a matrix for each head, "rms" and "layer" the
    factors of such a norm, "vector" plain numbers.
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    kind: Literal["matrix", "heads", "rms", "layer", "vector"] = "matrix"
    optional: bool = False
    has_bias: bool = False  # one that must be there; matrices and layer norms may have others

    @property
    def is_vector(self) -> bool:
        return self.kind in ("rms", "layer", "vector")


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter of the model, in the order in which the layers use them."""
    D, V = config.hidden_size, config.vocab_size
    found = [Parameter(("embedding",), (Part("token_embd", (V, D)),))]
    if config.learned_positions:
        found.append(Parameter(("positions",), (Part("position_embd", (config.context_length, D)),)))
    found += _token_inputs(config) if config.layer_input_size else ()
    for index, kind in enumerate(config.layers):
        found += _Layer(config, index).parameters(kind)
    found.append(_norm(config, ("norm", "scale"), Part("output_norm", (D,))))
    found.append(Parameter(("head",), (Part("output", (V, D)),), optional=True))
    return found


def unread_tensors(config: ModelConfig) -> set[str]:
    """What a file may have though nothing reads it: keys and values of layers that read an earlier one's."""
    layers = [i for i, kind in enumerate(config.layers) if kind.keys_of is not None]
    return {f"blk.{i}.{name}.weight" for i in layers for name in ("attn_k", "attn_v", "attn_k_norm")}


def _token_inputs(config: ModelConfig) -> Iterator[Parameter]:
    """What tells every layer of the tokens, beside the residual."""
    P, at = config.layer_input_size, "token_inputs"
    features = config.num_layers * P
    yield Parameter((at, "embedding"), (Part("per_layer_token_embd", (config.vocab_size, features)),))
    project = Part("per_layer_model_proj", (features, config.hidden_size))
    yield Parameter((at, "project", "kernel"), (project,))
    yield Parameter((at, "norm", "scale"), (Part("per_layer_proj_norm", (P,)),), "rms")


def _norm(config: ModelConfig, path: tuple[str, ...], part: Part) -> Parameter:
    """A norm over the hidden size."""
    norm = ARCHITECTURES[config.architecture].norm
    return Parameter(path, (part,), "rms" if norm == "rms" else "layer", has_bias=norm == "biased layer")


class _Layer:
    """The parameters of one layer."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        self.config, self.index = config.of(config.layers[index]), index
        self.arch = ARCHITECTURES[config.architecture]

    def parameters(self, kind: LayerKind) -> Iterator[Parameter]:
        c, arch = self.config, self.arch
        if c.pre_norms:
            yield self._norm("attention_norm", "attn_norm" if c.shared_norm else arch.attention_norm)
        if kind.delta_net is not None:
            yield from self._delta_net(kind.delta_net)
        elif c.latent is not None:
            yield from self._latent_attention(c.latent)
        elif kind.keys_of is not None:
            yield from self._shared_attention()
        else:
            yield from self._attention(kind)
        if c.has_mlp_norm and not c.shared_norm:
            yield self._norm("mlp_norm", arch.feed_forward_norm)
        if c.post_norms:
            yield self._norm("attention_post_norm", "post_attention_norm")
            yield self._norm("mlp_post_norm", "post_ffw_norm")
        yield from self._mlp("mlp") if c.moe is None or kind.dense else self._experts(c.moe)
        if c.layer_input_size:
            yield from self._layer_input(c.layer_input_size)
        if c.output_scales:
            yield Parameter(self._at("output_scale"), (self._part("layer_output_scale", 1),), "vector")

    def _at(self, path: str) -> tuple[str, ...]:
        return (f"layer_{self.index}", *path.split("/"))

    def _part(self, name: str, *shape: int) -> Part:
        return Part(f"blk.{self.index}.{name}", shape)

    def _norm(self, path: str, name: str) -> Parameter:
        return _norm(self.config, self._at(f"{path}/scale"), self._part(name, self.config.hidden_size))

    def _scale(self, path: str, name: str, size: int) -> Parameter:
        """The factors of a norm of anything else: always of the root mean square."""
        return Parameter(self._at(f"{path}/scale"), (self._part(name, size),), "rms")

    def _matrix(self, path: str, *parts: Part, has_bias: bool = False) -> Parameter:
        return Parameter(self._at(f"{path}/kernel"), parts, has_bias=has_bias)

    def _attention(self, kind: LayerKind) -> Iterator[Parameter]:
        c, part = self.config, self._part
        D, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        fused = (part("attn_qkv", q + 2 * kv, D),)
        gated_q = 2 * q if kind.is_gated else q  # each head's query, then its gate
        separate = (part("attn_q", gated_q, D), part("attn_k", kv, D), part("attn_v", kv, D))
        qkv = fused if self.arch.fused_qkv else separate[: 2 if kind.values_are_keys else 3]
        yield self._matrix("attention/qkv", *qkv, has_bias=self.arch.biased)
        yield from self._qk_norms(q, kv)
        if c.sinks:
            yield Parameter(self._at("attention/sinks"), (part("attn_sinks", c.num_heads),), "vector")
        yield self._matrix("attention/out", part("attn_output", D, q))

    def _qk_norms(self, q: int, kv: int) -> Iterator[Parameter]:
        c = self.config
        for name, heads, size in (("q_norm", c.num_heads, q), ("k_norm", c.num_kv_heads, kv)):
            match c.qk_norm:
                case QKNorm.HEAD:
                    yield self._scale(f"attention/{name}", f"attn_{name}", c.head_dim)
                case QKNorm.PROJECTION:
                    yield self._scale(f"attention/{name}", f"attn_{name}", size)
                case QKNorm.EACH_HEAD:
                    own = self._part(f"attn_{name}", heads, c.head_dim)
                    yield Parameter(self._at(f"attention/{name}/scale"), (own,), "layer")

    def _shared_attention(self) -> Iterator[Parameter]:
        c, part = self.config, self._part
        D, q = c.hidden_size, c.num_heads * c.head_dim
        yield self._matrix("attention/q_proj", part("attn_q", q, D))
        yield self._scale("attention/q_norm", "attn_q_norm", c.head_dim)
        yield self._matrix("attention/out", part("attn_output", D, q))

    def _delta_net(self, net: DeltaNetConfig) -> Iterator[Parameter]:
        part, D, H = self._part, self.config.hidden_size, net.value_heads
        apart = part("ssm_beta", H, D), part("ssm_alpha", H, D)
        scalars = (part("ssm_ba", 2 * H, D),) if net.is_grouped else apart
        mixed, gate = part("attn_qkv", net.channels, D), part("attn_gate", net.values, D)
        yield self._matrix("delta_net/in", mixed, gate, *scalars)
        rate = Part(f"blk.{self.index}.ssm_a", (H,), suffix="")
        bias = Part(f"blk.{self.index}.ssm_dt", (H,), suffix="bias")
        taps = part("ssm_conv1d", net.channels, net.taps)
        for path, vector in (("taps", taps), ("rate", rate), ("rate_bias", bias)):
            yield Parameter(self._at(f"delta_net/{path}"), (vector,), "vector")
        yield self._scale("delta_net/norm", "ssm_norm", net.head_dim)
        yield self._matrix("delta_net/out", part("ssm_out", D, net.values))

    def _latent_attention(self, latent: LatentConfig) -> Iterator[Parameter]:
        c, part = self.config, self._part
        D, N, rank = c.hidden_size, c.num_heads, latent.rank
        queries = N * (latent.plain_dim + latent.rope_dim)
        if latent.query_rank:
            yield self._matrix("attention/q_down", part("attn_q_a", latent.query_rank, D))
            yield self._scale("attention/q_norm", "attn_q_a_norm", latent.query_rank)
            yield self._matrix("attention/q_proj", part("attn_q_b", queries, latent.query_rank))
        else:
            yield self._matrix("attention/q_proj", part("attn_q", queries, D))
        yield self._matrix("attention/kv_down", part("attn_kv_a_mqa", rank + latent.rope_dim, D))
        yield self._scale("attention/kv_norm", "attn_kv_a_norm", rank)
        for path, up in zip(("attention/k_up", "attention/v_up"), self._ups(latent), strict=True):
            yield Parameter(self._at(path), (up,), "heads")
        yield self._matrix("attention/out", part("attn_output", D, N * latent.value_dim))

    def _ups(self, latent: LatentConfig) -> tuple[Part, Part]:
        """What brings each head's queries into the latent space, and its values out of it."""
        N, rank, plain, value = self.config.num_heads, latent.rank, latent.plain_dim, latent.value_dim
        if not latent.is_joined:
            return self._part("attn_k_b", N, rank, plain), self._part("attn_v_b", N, value, rank)
        both, height = self._part("attn_kv_b", N * (plain + value), rank), plain + value
        keys = HeadRows(N, height, 0, plain, is_transposed=True)
        return replace(both, rows=keys), replace(both, rows=HeadRows(N, height, plain, value, False))

    def _layer_input(self, features: int) -> Iterator[Parameter]:
        D = self.config.hidden_size
        yield self._matrix("layer_input/gate", self._part("inp_gate", features, D))
        yield self._matrix("layer_input/out", self._part("proj", D, features))
        yield self._norm("layer_input/norm", "post_norm")

    def _mlp(self, at: str) -> Iterator[Parameter]:
        c, part = self.config, self._part
        D, F = c.hidden_size, c.ffn_size
        if not c.activation.is_gated:
            yield self._matrix(f"{at}/up", part("ffn_up", F, D))
        elif self.arch.fused_gate_up:
            yield self._matrix(f"{at}/gate_up", part("ffn_up", 2 * F, D))
        else:
            yield self._matrix(f"{at}/gate_up", part("ffn_gate", F, D), part("ffn_up", F, D))
        yield self._matrix(f"{at}/down", part("ffn_down", D, F))

    def _experts(self, moe: MoEConfig) -> Iterator[Parameter]:
        part = self._part
        D, E, F = self.config.hidden_size, moe.num_experts, moe.size
        yield self._matrix("mlp/router", part("ffn_gate_inp", E, D))
        if moe.has_bias:
            bias = Part(f"blk.{self.index}.exp_probs_b", (E,), suffix="bias")
            yield Parameter(self._at("mlp/bias"), (bias,), "vector")
        for e in range(E):

            def mine(name: str, out: int, into: int, e: int = e) -> Part:
                whole = part(name, E, out, into)
                return Part(whole.name, whole.shape, e)

            separate = mine("ffn_gate_exps", F, D), mine("ffn_up_exps", F, D)
            gate_up = (mine("ffn_gate_up_exps", 2 * F, D),) if moe.fused_gate_up else separate
            yield Parameter(self._at(f"mlp/experts/gate_up/{e}"), gate_up)
            yield Parameter(self._at(f"mlp/experts/down/{e}"), (mine("ffn_down_exps", D, F),))
        if moe.has_scales:
            scales = Part(f"blk.{self.index}.ffn_down_exps", (E,), suffix="scale")
            yield Parameter(self._at("mlp/scales"), (scales,), "vector")
        if moe.is_beside:
            yield from self._plain_beside()
        if moe.shared_size:
            yield from self._shared_expert(moe)

    def _plain_beside(self) -> Iterator[Parameter]:
        """The plain feed-forward layer beside experts, and the norms of both."""
        router = Part(f"blk.{self.index}.ffn_gate_inp", (self.config.hidden_size,), suffix="scale")
        yield Parameter(self._at("mlp/router_norm/scale"), (router,), "rms")
        yield from self._mlp("mlp/plain")
        yield self._norm("mlp/plain_norm", self.arch.feed_forward_norm)
        yield self._norm("mlp/experts_norm", "pre_ffw_norm_2")
        yield self._norm("mlp/plain_post_norm", "post_ffw_norm_1")
        yield self._norm("mlp/experts_post_norm", "post_ffw_norm_2")

    def _shared_expert(self, moe: MoEConfig) -> Iterator[Parameter]:
        part, D, F = self._part, self.config.hidden_size, moe.shared_size
        gate_up = part("ffn_gate_shexp", F, D), part("ffn_up_shexp", F, D)
        yield self._matrix("mlp/shared/gate_up", *gate_up)
        yield self._matrix("mlp/shared/down", part("ffn_down_shexp", D, F))
        if moe.gated_shared:
            yield Parameter(self._at("mlp/shared_gate"), (part("ffn_gate_inp_shexp", D),), "vector")
