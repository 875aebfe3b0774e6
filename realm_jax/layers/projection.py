"""What the layers are made of: where tokens stand, projections, norms."""

from typing import Any

import flax.linen as nn
import jax
from flax import struct
from jaxtyping import Array, Float

from realm_jax.config import LayerKind, ModelConfig
from realm_jax.nodes import Rotation


@struct.dataclass
class Where:
    """Which slots and positions the tokens of a call belong to, and their turns by rope name."""

    slots: jax.Array | None  # [B]; None: row b is slot b
    positions: jax.Array  # [B, T] absolute
    rotations: dict[str, Rotation]
    lengths: jax.Array | None = None  # [B] tokens of each row that are real; None: all
    inputs: jax.Array | None = None  # [B, T, P] what one layer has of the tokens beside the residual


def weight(module: nn.Module, name: str, shape: tuple[int, ...]) -> Any:
    """The node called `name` of this module, its logical shape checked."""
    node = module.get_variable("params", name)
    if tuple(node.shape) != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"{path} is {tuple(node.shape)}; the model needs {shape}")
    return node


def scoring(config: ModelConfig, kind: LayerKind) -> dict[str, Any]:
    """How attention weighs keys, as `Cache.attend` takes it."""
    return {
        "scale": config.attention_scale,
        "softcap": config.attention_softcap,
        "window": kind.window,
    }


class Linear(nn.Module):
    """A projection to `features` outputs."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        return x @ weight(self, "kernel", (x.shape[-1], self.features))


class Norm(nn.Module):
    """Rows brought to size 1, then scaled by learned factors, as the node of these says."""

    eps: float
    axes: int = 1  # of the factors: the last of the rows', which are one each

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return weight(self, "scale", x.shape[-self.axes :]).normalize(x, self.eps)


class HookPoint(nn.Module):
    """What it is given, by a name: where research sees and changes what no other module gives."""

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        return x
