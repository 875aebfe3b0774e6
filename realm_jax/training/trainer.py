"""Trainer: an adapter for a loaded model, step by step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.layers import Block
from realm_jax.loading import LoadedModel
from realm_jax.lora import Adapter
from realm_jax.model import Transformer
from realm_jax.parallel import OneDevice
from realm_jax.training.batches import Batch, Batches, split
from realm_jax.training.blocks import CheckpointedBlock
from realm_jax.training.checkpoints import Checkpoints, History, Saved
from realm_jax.training.data import Example
from realm_jax.training.settings import TrainingConfig
from realm_jax.training.step import Step
from realm_jax.training.targets import Factors, as_adapter, chosen_parts, initial_factors


@dataclass(frozen=True)
class Progress:
    """What a step did.

    evaluation: the mean loss on the examples kept from training, where it was computed.
    """

    step: int
    steps: int
    loss: float
    evaluation: float | None
    tokens: int
    seconds: float


class Trainer:
    """Trains an adapter on examples; the model is only read.

        trainer = Trainer(load_model(path, EngineConfig()), examples, TrainingConfig(rank=8))
        trainer.run()
        trainer.adapter("mine")

    checkpoints: where the training is kept; None = nowhere. `resume` goes on from the newest one.
    """

    def __init__(
        self,
        model: LoadedModel,
        examples: Sequence[Example],
        config: TrainingConfig,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        if not isinstance(model.placement, OneDevice):
            raise UnsupportedError("training runs on one device; load the model without a mesh")
        if model.config.is_recurrent:
            raise UnsupportedError(
                f"{model.path.name} has recurrent layers, through which nothing is trained yet; take another "
                "model"
            )
        self.config, self._checkpoints, self._params = config, checkpoints, model.params
        if config.eval_split and len(examples) < 2:
            raise RequestError(f"eval_split is {config.eval_split}; there is one example, nothing to keep")
        trained, kept = split(examples, config.eval_split, config.seed)
        self.batches = Batches(trained, config.batch_size, config.seed)
        self._kept = Batches(kept, config.batch_size, config.seed).in_order() if kept else []
        self._every = config.eval_every or max(1, self.batches.per_epoch // config.grad_accum)
        whole = math.ceil(config.epochs * self.batches.per_epoch / config.grad_accum)
        self.steps = whole if config.steps is None else config.steps
        block = CheckpointedBlock if config.checkpoint_blocks else Block
        self._step = Step(Transformer(model.config, block), config, self.steps)
        self._parts = chosen_parts(model.config, config.targets)
        factors = initial_factors(self._parts, config.rank, config.seed)
        self._now = Saved(self._step.initial(factors), factors if kept else None, History())

    @property
    def history(self) -> History:
        """How it went so far."""
        return self._now.history

    @property
    def trained_numbers(self) -> int:
        """How many numbers the adapter has."""
        return sum(x.size for x in jax.tree.leaves(self._now.state.factors))

    @property
    def factors(self) -> Factors:
        """The result: with `patience` those of the best evaluation, else the newest."""
        best = self._now.best
        return self._now.state.factors if self.config.patience is None or best is None else best

    def adapter(self, name: str) -> Adapter:
        """The result, as files hold it."""
        return as_adapter(self.factors, self.config, name)

    def resume(self) -> None:
        """The training stands where its newest checkpoint was written; without one, at its beginning."""
        if self._checkpoints is not None and self._checkpoints.latest() is not None:
            self._now = self._checkpoints.load(self._now)

    def save(self) -> None:
        """A checkpoint of this moment is on disk, if any are kept."""
        if self._checkpoints is not None:
            self._checkpoints.save(self._now)

    @property
    def is_done(self) -> bool:
        """All steps are done, or evaluations have not become better for as many as `patience`."""
        patience = self.config.patience
        is_stuck = patience is not None and self.history.since_best >= patience
        return self.history.step >= self.steps or is_stuck

    def run(self, on_step: Callable[[Progress], None] = lambda _: None) -> None:
        """All steps that are left; when it is interrupted, what was done is saved.

        Raises RequestError where the loss is no longer a number.
        """
        batches = self.batches.starting_at(self.history.step * self.config.grad_accum)
        try:
            while not self.is_done:
                on_step(self._advance(batches))
                if self.history.step % self.config.save_every == 0:
                    self.save()
        finally:
            self.save()

    def _advance(self, batches: Iterator[Batch]) -> Progress:
        """One step, and an evaluation if it is time; the training changes in one assignment at the end."""
        start, c, now = time.perf_counter(), self.config, self._now
        factors, first = now.state.factors, now.history.step * c.grad_accum
        gradients = jax.tree.map(jnp.zeros_like, factors)
        used = [next(batches) for _ in range(c.grad_accum)]
        losses = []
        for i, batch in enumerate(used):
            arrays = (batch.tokens, batch.is_target, np.int32((first + i) % (1 << 31)))
            gradients, loss = self._step.accumulate(self._params, factors, gradients, *arrays)
            losses.append(loss)
        targets = sum(batch.targets for batch in used)
        loss = math.fsum(map(float, losses)) / targets
        step = now.history.step + 1
        if not math.isfinite(loss):
            raise RequestError(f"the loss is {loss} at step {step:,}: lower lr, now {c.lr:g}, or clip")
        state = self._step.update(now.state, gradients, np.int32(targets))
        history = History([*now.history.losses, loss], list(now.history.evaluations))
        best, evaluation = now.best, None
        if self._kept and (step % self._every == 0 or step == self.steps):
            evaluation = self.evaluate(state.factors)
            history.evaluations.append((step, evaluation))
            best = state.factors if history.since_best == 0 else best
        jax.block_until_ready(state)
        self._now = Saved(state, best, history)
        tokens = sum(batch.length for batch in used)
        return Progress(step, self.steps, loss, evaluation, tokens, time.perf_counter() - start)

    def evaluate(self, factors: Factors) -> float:
        """The mean loss over the completions that were kept from training."""
        arrays = [(batch.tokens, batch.is_target) for batch in self._kept]
        total = math.fsum(float(self._step.loss(self._params, factors, *each)) for each in arrays)
        return total / sum(batch.targets for batch in self._kept)
