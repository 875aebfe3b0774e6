"""The compiled programs of training: gradients of a batch, an update by them, the loss of a batch.

B rows, T tokens.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from realm_jax.model import Transformer
from realm_jax.training.loss import summed_loss
from realm_jax.training.settings import TrainingConfig
from realm_jax.training.targets import Factors, adapted, deltas, dropped_deltas
from realm_jax.weights import Params


@struct.dataclass
class State:
    """What a step changes."""

    factors: Factors
    optimizer: Any  # optax's moments of each factor, and how many steps there were


@dataclass(frozen=True)
class Step:
    """A step of AdamW (Loshchilov and Hutter 2019) on the factors; the base is only read.

    total: steps of the whole training, over which the learning rate grows and falls.
    """

    model: Transformer
    config: TrainingConfig
    total: int

    def initial(self, factors: Factors) -> State:
        """The state before the first step."""
        return State(factors, self._optimizer().init(factors))  # pyright: ignore[reportArgumentType]

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def accumulate(
        self,
        params: Params,
        factors: Factors,
        gradients: Factors,
        tokens: Int[Array, "B T"],
        is_target: Bool[Array, "B T"],
        index: Int[Array, ""],
    ) -> tuple[Factors, Float[Array, ""]]:
        """The gradients with those of the batch's summed loss added, and that loss.

        index: the batch's number in the training, which decides what dropout leaves out.
        """
        c = self.config
        key = jax.random.fold_in(jax.random.key(c.seed), index)

        def loss(factors: Factors) -> Array:
            changes = dropped_deltas(factors, c.scale, c.dropout, key)
            return summed_loss(self.model, adapted(params, self.model.config, changes), tokens, is_target)

        value, found = jax.value_and_grad(loss)(factors)
        return jax.tree.map(jnp.add, gradients, found), value

    @functools.partial(jax.jit, static_argnums=0)
    def update(self, state: State, gradients: Factors, targets: Int[Array, ""]) -> State:
        """The state after a step by the mean gradient over so many targets."""
        mean = jax.tree.map(lambda g: g / targets.astype(jnp.float32), gradients)
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, optimizer = self._optimizer().update(mean, state.optimizer, state.factors)
            return State(optax.apply_updates(state.factors, updates), optimizer)  # pyright: ignore[reportArgumentType]

    @functools.partial(jax.jit, static_argnums=0)
    def loss(
        self, params: Params, factors: Factors, tokens: Int[Array, "B T"], is_target: Bool[Array, "B T"]
    ) -> Float[Array, ""]:
        """The batch's summed loss, nothing dropped."""
        changes = deltas(factors, self.config.scale)
        return summed_loss(self.model, adapted(params, self.model.config, changes), tokens, is_target)

    def _optimizer(self) -> optax.GradientTransformation:
        c = self.config
        warmup = min(-(-self.total // 20) if c.warmup is None else c.warmup, self.total - 1)
        # the first step is not lost: its rate is that of step 1, not 0
        rate = optax.warmup_cosine_decay_schedule(c.lr / (warmup + 1), c.lr, warmup, self.total)
        return optax.chain(optax.clip_by_global_norm(c.clip), optax.adamw(rate, weight_decay=c.weight_decay))
