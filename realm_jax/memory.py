"""What a model with its draft and its adapters needs, known from the files before anything is loaded."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from realm_jax import gguf, lora, runtime
from realm_jax.architectures import read_config
from realm_jax.banks import bank_bytes
from realm_jax.config import EngineConfig
from realm_jax.errors import CapacityError
from realm_jax.loading import MemoryPlan, plan_memory
from realm_jax.lora import FoldedFile


def needed_bytes(
    path: Path,
    config: EngineConfig,
    *,
    draft: Path | None = None,
    adapters: Iterable[Path] = (),
    fold: Iterable[tuple[Path, float]] = (),
) -> int:
    """Bytes of weights and caches, the draft's too, and of the bank of adapters, where there are any.

    Raises CapacityError where they are more than `config.memory`, ModelFileError for a broken file,
    UnsupportedError where --memory does not count.
    """
    runtime.configure(config)
    plan, bank = _plan(path, config, adapters, fold)
    left = None if config.memory is None else plan.left_of(config.memory)
    needed = plan.weights + plan.caches + bank
    if draft is not None:
        drafts, _ = _plan(draft, replace(config, ctx_size=plan.context), (), ())
        needed += drafts.weights + drafts.caches
        try:
            left = None if left is None else drafts.left_of(left)
        except CapacityError as error:
            raise CapacityError(f"the draft model, in what the model leaves of --memory: {error}") from error
    if left is not None and bank > left:
        raise CapacityError(
            f"{config.max_loras} adapters take {bank / 1e6:,.1f} MB; memory leaves {left / 1e6:,.1f} MB "
            "(raise --memory, or lower max_loras)"
        )
    return needed


def _plan(
    path: Path, config: EngineConfig, adapters: Iterable[Path], fold: Iterable[tuple[Path, float]]
) -> tuple[MemoryPlan, int]:
    """The plan of a file, and the bytes of its bank."""
    numerics = runtime.resolve_numerics(config)
    with gguf.open(path) as file:
        model = read_config(file)
        base = lora.Base.of(file, model)
        ranks = [lora.read(each, base).rank for each in adapters]
        folded = FoldedFile(file, tuple((lora.read(each, base), scale) for each, scale in fold))
        plan = plan_memory(folded, model, config, numerics)
    if config.max_lora_rank is not None:
        ranks.append(config.max_lora_rank)
    return plan, bank_bytes(model, numerics, config.max_loras, max(ranks)) if ranks else 0
