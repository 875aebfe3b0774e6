"""Facts of a training run, named as the flags of `realm lora train`."""

from dataclasses import dataclass, field

from realm_jax.errors import RequestError

DEFAULT_TARGETS = ("all",)


@dataclass(frozen=True)
class TrainingConfig:
    """How an adapter is trained.

    targets: matrices to adapt: q, k, v, o, gate, up, down, their GGUF or Hugging Face names, or all.
    alpha: the change is alpha / rank times b @ a, with rslora alpha / sqrt(rank) (Kalajdzievski 2023).
    steps: optimizer steps; None = as many as `epochs` take.
    batch_size: sequences of one call; grad_accum: calls of one step.
    warmup: steps in which the learning rate grows to `lr`, from which it falls to 0 by a cosine; None = a
      twentieth of all.
    eval_split: share of the examples kept from training, on which each evaluation is made.
    eval_every: steps between evaluations; None = once an epoch.
    patience: evaluations without a better one before training stops, and the best adapter is the result.
    clip: the norm that gradients are shortened to.
    checkpoint_blocks: activations inside a layer are computed anew rather than kept.
    save_every: steps between checkpoints.
    """

    targets: tuple[str, ...] = DEFAULT_TARGETS
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    grad_accum: int = 1
    lr: float = 2e-4
    warmup: int | None = None
    weight_decay: float = 0.0
    clip: float = 1.0
    eval_split: float = 0.0
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_blocks: bool = False
    save_every: int = 100
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        for name, (low, high) in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPEN:
                continue
            if type(value) is not int or not low <= value <= high:
                raise RequestError(f"{name} is {value!r}; it must be a whole number from {low:,} to {high:,}")
        for name, (low, high) in _REAL.items():
            value = getattr(self, name)
            if not isinstance(value, int | float) or not low <= value <= high:  # NaN too
                raise RequestError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}")
        if not self.targets:
            raise RequestError("targets is empty; name some, or all")
        if self.patience is not None and not self.eval_split:
            raise RequestError("patience needs an evaluation: set eval_split, such as 0.1")

    @property
    def scale(self) -> float:
        """What b @ a is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


_WHOLE = {
    "rank": (1, 1 << 12),
    "steps": (1, 1 << 32),
    "batch_size": (1, 1 << 12),
    "grad_accum": (1, 1 << 16),
    "warmup": (0, 1 << 32),
    "eval_every": (1, 1 << 32),
    "patience": (1, 1 << 32),
    "save_every": (1, 1 << 32),
    "seed": (0, (1 << 32) - 1),
}
_OPEN = ("steps", "warmup", "eval_every", "patience")
_REAL = {
    "alpha": (1e-6, 1e6),
    "dropout": (0.0, 0.99),
    "epochs": (1e-3, 1e6),
    "lr": (1e-12, 10.0),
    "weight_decay": (0.0, 10.0),
    "clip": (1e-6, 1e9),
    "eval_split": (0.0, 0.9),
}
