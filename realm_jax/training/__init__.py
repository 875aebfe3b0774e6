"""Training of adapters on a frozen base, quantized or not.

    model = load_model(hub.resolve(None), EngineConfig(ctx_size=512))
    examples, _ = Reader(model.tokenizer, model.template, model.context).read(Path("examples.jsonl"))
    trainer = Trainer(model, examples, TrainingConfig(rank=8, lr=1e-3))
    trainer.run(print)
    write_adapter(trainer, model, Path("mine"))

It needs optax and orbax-checkpoint: `pip install 'realm-jax[train]'`.
"""

from realm_jax.training.checkpoints import Checkpoints, History, latest_step
from realm_jax.training.data import Example, Reader
from realm_jax.training.results import fingerprint, write_adapter
from realm_jax.training.settings import TrainingConfig
from realm_jax.training.trainer import Progress, Trainer

__all__ = [
    "Checkpoints",
    "Example",
    "History",
    "Progress",
    "Reader",
    "Trainer",
    "TrainingConfig",
    "fingerprint",
    "latest_step",
    "write_adapter",
]
