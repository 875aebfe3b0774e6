"""A draft's layers learn what another model finds likely.

B rows, T tokens, n positions to learn, K likeliest tokens of each, D hidden, F frequent tokens, R rare ones.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from draft_text import Answer
from flax import struct
from jaxtyping import Array, Float

from realm_jax.errors import RequestError
from realm_jax.kernels import matmul
from realm_jax.loading import LoadedModel
from realm_jax.model import Transformer, hidden_states
from realm_jax.sequence_cache import empty_sequence_caches
from realm_jax.weights import Params

CHUNK = 512
"""Positions whose logits stand at once."""

STEP = 32
"""Lengths are multiples of it."""

Numbers = Any
"""An array of NumPy's or JAX's."""


@dataclass(frozen=True)
class Distillation:
    """How a draft is trained.

    frequent: tokens of the vocabulary that every step scores; rare: how many of the others, drawn anew for
      each step, stand for all of them (Jean et al. 2015).
    """

    epochs: int = 6
    batch_size: int = 2
    lr: float = 2e-3
    warmup: int = 20
    clip: float = 1.0
    frequent: int = 8192
    rare: int = 2048
    seed: int = 0


@struct.dataclass
class Batch:
    """Sequences of one length. `at` numbers the positions that precede a token to learn, row after row."""

    tokens: Numbers  # int32 [B, T]
    at: Numbers  # int32 [n], filled up with 0
    top: Numbers  # int32 [n, K]
    share: Numbers  # float32 [n, K]
    count: Numbers  # int32 [], of `at` that count


@struct.dataclass
class Words:
    """The head's rows that a step scores."""

    frequent: jax.Array  # [F, D]
    rare: Numbers  # int32 [R] token ids
    weight: Numbers  # float32 [], log of how many tokens each rare one stands for


@struct.dataclass
class State:
    """What a step changes."""

    layers: Params  # and the last norm, in float32
    optimizer: Any


@dataclass(frozen=True)
class Step:
    """A step of Adam (Kingma and Ba 2015) on a draft's layers and last norm; the rest is only read.

    Products are made in bfloat16, their sums and the layers themselves are kept in float32.
    """

    model: Transformer
    clip: float

    def initial(self, params: Params) -> State:
        """The state before the first step."""
        layers = {name: node for name, node in params.items() if name.startswith("layer_") or name == "norm"}
        return State(layers, self._optimizer().init(layers))

    @functools.partial(jax.jit, static_argnums=0)
    def __call__(
        self, params: Params, state: State, batch: Batch, words: Words, rate: Float[Array, ""]
    ) -> tuple[State, Float[Array, ""]]:
        """The state after a step, and the batch's mean divergence before it."""
        hidden, backward = jax.vjp(lambda layers: self._hidden(params, layers, batch.tokens), state.layers)
        count = batch.count.astype(jnp.float32)
        total, slope = divergence(params["head"], hidden[batch.at], batch, words)
        (gradients,) = backward(jnp.zeros_like(hidden).at[batch.at].add(slope / count))
        with jax.numpy_dtype_promotion("standard"):  # optax counts on it
            updates, optimizer = self._optimizer().update(gradients, state.optimizer)
            layers = jax.tree.map(lambda x, update: x - rate * update, state.layers, updates)
        return State(layers, optimizer), total / count

    def _hidden(self, params: Params, layers: Params, tokens: Any) -> Float[Array, "BT D"]:
        B, T = tokens.shape
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 2 else x, layers)
        positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        caches = empty_sequence_caches(self.model.config)
        hidden, _ = hidden_states(self.model, {**params, **narrow}, tokens, positions, caches, None)
        return hidden.reshape(B * T, -1)

    def _optimizer(self) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(self.clip), optax.scale_by_adam(b2=0.95))


def divergence(
    head: Any, hidden: Float[Array, "n D"], batch: Batch, words: Words
) -> tuple[Float[Array, ""], Float[Array, "n D"]]:
    """The Kullback-Leibler divergence of all positions together, and its slope for each.

    The slope is found with the value, chunk by chunk: logits are made once and not kept.
    """
    n = hidden.shape[0]
    chunk = min(n, CHUNK)
    counted = jnp.arange(n, dtype=jnp.int32) < batch.count
    rare = head.rows(words.rare)

    def scored(hidden: Array, top: Array, share: Array, counted: Array) -> Array:
        wanted = (head.rows(top) * share[..., None]).sum(axis=1)  # its score is the mean of the wanted scores
        common = matmul(hidden, words.frequent)
        drawn = matmul(hidden, rare.astype(words.frequent.dtype)) + words.weight
        every = jax.nn.logsumexp(jnp.concatenate([common, drawn], axis=-1), axis=-1)
        loss = every - (hidden * wanted).sum(axis=-1) + jax.scipy.special.xlogy(share, share).sum(axis=-1)
        return jnp.where(counted, loss, 0.0).sum()

    def nothing(hidden: Array, *_: Array) -> tuple[Array, Array]:
        return jnp.float32(0), jnp.zeros_like(hidden)

    def add(total: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
        loss, slope = jax.lax.cond(part[-1][0], jax.value_and_grad(scored), nothing, *part)
        return total + loss, slope

    parts = [
        jnp.pad(x, [(0, -n % chunk)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])
        for x in (hidden, batch.top, batch.share, counted)
    ]
    total, slope = jax.lax.scan(add, jnp.float32(0), tuple(parts))
    return total, slope.reshape(-1, hidden.shape[1])[:n]


class Vocabulary:
    """Which tokens are frequent in the answers, and draws of the others."""

    def __init__(self, params: Params, answers: Sequence[Answer], config: Distillation) -> None:
        size = params["head"].shape[1]
        mass = np.zeros(size)
        for answer in answers:
            np.add.at(mass, answer.top, answer.share)
        order = np.argsort(-mass, kind="stable").astype(np.int32)
        self._frequent = params["head"].rows(jnp.asarray(order[: config.frequent])).astype(jnp.bfloat16)
        self._others = order[config.frequent :]
        self._count = min(config.rare, len(self._others))
        self._rng = np.random.default_rng([config.seed, 1])

    def draw(self) -> Words:
        """The words of a step."""
        rare = self._rng.choice(self._others, self._count, replace=False, shuffle=False)
        weight = math.log(len(self._others) / self._count) if self._count else 0.0
        return Words(self._frequent, rare, np.float32(weight))


def batches(answers: Sequence[Answer], size: int, seed: int) -> Iterator[Batch]:
    """All answers again and again, each time in another order, in batches of two lengths."""
    longest = -(-max(len(answer.ids) for answer in answers) // STEP) * STEP
    lengths = (-(-longest // (2 * STEP)) * STEP, longest)
    rng = np.random.default_rng(seed)
    while True:
        shuffled = [answers[i] for i in rng.permutation(len(answers)).tolist()]
        found = []
        for low, high in zip((0, lengths[0]), lengths, strict=True):
            mine = [answer for answer in shuffled if low < len(answer.ids) <= high]
            found += [(high, mine[i : i + size]) for i in range(0, len(mine), size)]
        for i in rng.permutation(len(found)).tolist():
            yield _batch(size, *found[i])


def _batch(size: int, length: int, answers: Sequence[Answer]) -> Batch:
    n, top = size * length, answers[0].top.shape[1]
    tokens, at = np.zeros((size, length), np.int32), np.zeros(n, np.int32)
    best, share = np.zeros((n, top), np.int32), np.zeros((n, top), np.float32)
    used = 0
    for row, answer in enumerate(answers):
        tokens[row, : len(answer.ids)] = answer.ids
        mine = slice(used, used + answer.count)
        at[mine] = row * length + np.arange(answer.start, len(answer.ids)) - 1
        best[mine], share[mine] = answer.top, answer.share
        used += answer.count
    return Batch(tokens, at, best, share, np.int32(used))


@dataclass(frozen=True)
class Trained:
    """The draft's params and how they came to be."""

    params: Params
    losses: list[float]
    tokens: int
    seconds: float


def train(
    draft: LoadedModel,
    answers: Sequence[Answer],
    config: Distillation,
    seconds: float,
    on_step: Callable[[int, int, float], None] = lambda *_: None,
) -> Trained:
    """The draft, which is dense and in float32, after as many epochs as were asked for or there is time for.

    The learning rate falls to 0 by a cosine over whichever ends first.
    Raises RequestError where the loss is no longer a number.
    """
    start = time.perf_counter()
    step = Step(Transformer(draft.config), config.clip)
    state, vocabulary = step.initial(draft.params), Vocabulary(draft.params, answers, config)
    total = config.epochs * -(-len(answers) // config.batch_size)
    losses: list[float] = []
    tokens = 0
    for number, batch in enumerate(batches(answers, config.batch_size, config.seed)):
        progress = max(number / total, (time.perf_counter() - start) / seconds)
        if progress >= 1:
            break
        rate = config.lr * min(1, (number + 1) / config.warmup) * (1 + math.cos(math.pi * progress)) / 2
        state, loss = step(draft.params, state, batch, vocabulary.draw(), np.float32(rate))
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            raise RequestError(
                f"the loss is {losses[-1]} at step {number + 1:,}: lower lr, now {config.lr:g}"
            )
        tokens += int(batch.count)
        on_step(number + 1, total, losses[-1])
    return Trained({**draft.params, **state.layers}, losses, tokens, time.perf_counter() - start)
