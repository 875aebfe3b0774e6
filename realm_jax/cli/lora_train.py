"""`realm lora train`: an adapter from examples."""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from realm_jax.cli import options, plots
from realm_jax.cli.flags import flag
from realm_jax.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from realm_jax.loading import LoadedModel
    from realm_jax.training import History, Progress, Trainer, TrainingConfig

CHECKPOINTS = "checkpoints"  # the folder in OUT_DIR


def _option(name: str, text: str, **settings: Any) -> typer.models.OptionInfo:
    settings.setdefault("metavar", "N")
    return typer.Option(name, help=text, **settings)


@dataclass(frozen=True)
class ModelFlags:
    """The base, and how it is stored and multiplied: `EngineConfig`."""

    model: options.Model = None
    ctx_size: options.CtxSize = None
    threads: Annotated[int | None, flag("-t --threads", "CPU threads.", metavar="N", default="all")] = None
    device: options.Device = "auto"
    dtype: options.DType = "auto"
    weights: Annotated[
        Literal["auto", "dense", "quantized", "int8"],
        flag("--weights", "The frozen base: expanded, the file's own codes, or rounded to 8 bits."),
    ] = "auto"
    kernels: options.Kernels = "auto"
    offline: options.Offline = False


@dataclass(frozen=True)
class TrainingFlags:
    """How to train: `TrainingConfig`, whose names and defaults these are."""

    targets: Annotated[
        str,
        _option(
            "--targets",
            "Matrices to adapt: some of q,k,v,o,gate,up,down, their GGUF or Hugging Face names, or all.",
            metavar="NAMES",
        ),
    ] = "all"
    rank: Annotated[int, _option("--rank", "Of each change.")] = 16
    alpha: Annotated[float, _option("--alpha", "Changes are scaled by alpha / rank.", metavar="X")] = 32.0
    rslora: Annotated[bool, _option("--rslora", "Scale by alpha / sqrt(rank) instead.", metavar=None)] = False
    dropout: Annotated[float, _option("--dropout", "Share of a change's inputs to drop.", metavar="X")] = 0.0
    epochs: Annotated[float, _option("--epochs", "How often to see each example.", metavar="X")] = 3.0
    steps: Annotated[int | None, _option("--steps", "Optimizer steps, instead of --epochs.")] = None
    batch_size: Annotated[int, _option("--batch-size", "Examples computed at once.")] = 8
    grad_accum: Annotated[int, _option("--grad-accum", "Batches of one step.")] = 1
    lr: Annotated[float, _option("--lr", "The highest learning rate.", metavar="X")] = 2e-4
    warmup: Annotated[
        int | None,
        _option(
            "--warmup",
            "Steps until the learning rate is there; it falls by a cosine.  [default: a twentieth of all]",
            show_default=False,
        ),
    ] = None
    weight_decay: Annotated[float, _option("--weight-decay", "Of AdamW.", metavar="X")] = 0.0
    clip: Annotated[float, _option("--clip", "The largest norm of a gradient.", metavar="X")] = 1.0
    eval_split: Annotated[
        float, _option("--eval-split", "Share of the examples to evaluate on, not trained on.", metavar="X")
    ] = 0.0
    eval_every: Annotated[
        int | None,
        _option(
            "--eval-every", "Steps between evaluations.  [default: those of an epoch]", show_default=False
        ),
    ] = None
    patience: Annotated[
        int | None,
        _option("--patience", "Stop after so many evaluations that are no better, and keep the best."),
    ] = None
    checkpoint_blocks: Annotated[
        bool, _option("--checkpoint-blocks", "Compute layers anew: less memory, more time.", metavar=None)
    ] = False
    save_every: Annotated[int, _option("--save-every", "Steps between checkpoints.")] = 100
    seed: Annotated[int, _option("--seed", "Of the order, the first factors and dropout.")] = 0


def train(
    *,
    data: Annotated[Path, typer.Argument(help="The examples, one JSON object a line.", metavar="DATA.jsonl")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where all goes.", metavar="OUT_DIR")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    drop_long: Annotated[
        bool, typer.Option("--drop-long", help="Leave out examples longer than --ctx-size.")
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the loss.", metavar="FILE.png")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    model: ModelFlags,
    training: TrainingFlags,
) -> None:
    """Train an adapter (LoRA, Hu et al. 2021) on the frozen model, quantized as it is served.

    A line of DATA is {"messages": [...]}, of which the assistant's turns are learned, or {"prompt",
    "completion"}. OUT_DIR gets adapter.gguf, the same as peft/, training.json with all losses, and
    checkpoints; Ctrl-C saves one, and --resume gives the losses of an uninterrupted training.

    Example: realm lora train -m model.gguf examples.jsonl -o mine --rank 16 --lr 2e-4 --eval-split 0.05
    """
    if plot is not None:
        plots.check_plot(plot)
    try:
        import optax  # noqa: F401
        import orbax.checkpoint  # noqa: F401
    except ImportError as error:
        raise UnsupportedError("training needs optax and orbax: pip install 'realm-jax[train]'") from error

    from realm_jax.training import TrainingConfig, latest_step

    if not resume and latest_step(output / CHECKPOINTS) is not None:
        raise RequestError(f"{output} holds a training (--resume continues it, or give another folder)")
    chosen = dataclasses.asdict(training)
    chosen["targets"] = tuple(name.strip() for name in training.targets.split(",") if name.strip())
    config = TrainingConfig(**chosen)
    trainer, loaded = _prepared(data, output, model, config, drops_long=drop_long)
    report = _Report(trainer)
    try:
        trainer.run(report.show)
    except KeyboardInterrupt:
        print(f"\nstopped at step {trainer.history.step:,}; --resume goes on from there", file=sys.stderr)
        raise
    report.finish()
    _write(trainer, loaded, output, plot, as_json=as_json, seconds=report.seconds)


def _prepared(
    data: Path, output: Path, model: ModelFlags, config: "TrainingConfig", *, drops_long: bool
) -> tuple["Trainer", "LoadedModel"]:
    """The training as it begins, or where it stopped."""
    from realm_jax import hub, runtime
    from realm_jax.cli.session import Status
    from realm_jax.config import EngineConfig
    from realm_jax.loading import load_model
    from realm_jax.training import Checkpoints, Reader, Trainer, fingerprint

    given = dataclasses.asdict(model)
    engine = EngineConfig(**{name: given[name] for name in given if name != "model"})
    path = hub.resolve(model.model, offline=model.offline)
    runtime.configure(engine)
    status = Status()
    try:
        loaded = load_model(path, engine, status.loading)
    finally:
        status.loaded()
    reader = Reader(loaded.tokenizer, loaded.template, loaded.context, drops_long)
    examples, dropped = reader.read(data)
    checkpoints = Checkpoints(output / CHECKPOINTS, fingerprint(loaded, examples, reader, config))
    trainer = Trainer(loaded, examples, config, checkpoints)
    try:
        (output / CHECKPOINTS).mkdir(parents=True, exist_ok=True)  # found out now, not after the training
    except OSError as error:
        raise RequestError(f"--output {output}: {error.strerror}") from error
    trainer.resume()
    lost = f" ({dropped:,} too long, left out)" if dropped else ""
    print(
        f"training {trainer.trained_numbers:,} numbers on {len(examples):,} examples{lost}, step "
        f"{trainer.history.step + 1:,} to {trainer.steps:,}; the first of each length compiles",
        file=sys.stderr,
    )
    return trainer, loaded


def _write(
    trainer: "Trainer",
    loaded: "LoadedModel",
    output: Path,
    plot: Path | None,
    *,
    as_json: bool,
    seconds: float,
) -> None:
    """The results in the folder, and what to print of them."""
    from realm_jax.training import write_adapter

    adapter = write_adapter(trainer, loaded, output)
    history = trainer.history
    facts = {
        "adapter": str(adapter),
        "steps": history.step,
        "loss": history.losses[-1],
        "evaluation": history.evaluations[-1][1] if history.evaluations else None,
        "best": None if history.best is None else {"step": history.best[0], "loss": history.best[1]},
        "seconds": round(seconds, 1),
    }
    if plot is not None:
        draw_losses(history, f"{loaded.path.name}, rank {trainer.config.rank}", plot)
    print(json.dumps(facts) if as_json else adapter)


def draw_losses(history: "History", title: str, path: Path) -> None:
    """The losses of the steps and of the evaluations, as a plot in a file."""
    with plots.axes(path, title=title, xlabel="step", ylabel="loss of a token") as axes:
        axes.plot(range(1, history.step + 1), history.losses, label="training", linewidth=1)
        if history.evaluations:
            steps, losses = zip(*history.evaluations, strict=True)
            axes.plot(steps, losses, marker="o", label="evaluation")
        axes.set_yscale("log")


class _Report:
    """Progress on stderr: a line that changes on a terminal; elsewhere one every ten seconds."""

    RECENT = 20  # steps whose middle one tells the time of a step: the first of a length compiles

    def __init__(self, trainer: "Trainer") -> None:
        self._trainer, self._recent = trainer, list[tuple[float, int]]()
        self._start = time.perf_counter()
        self._shown = 0.0
        self.seconds = 0.0

    def show(self, progress: "Progress") -> None:
        """What the step did, if it is time to say so; an evaluation always."""
        self._recent = [*self._recent[1 - self.RECENT :], (progress.seconds, progress.tokens)]
        now = time.perf_counter()
        is_terminal = sys.stderr.isatty()
        if progress.evaluation is None and not is_terminal and now - self._shown < 10:
            return
        self._shown = now
        middle = len(self._recent) // 2
        seconds = sorted(seconds for seconds, _ in self._recent)[middle]
        rate = sorted(tokens / seconds for seconds, tokens in self._recent)[middle]
        text = (
            f"step {progress.step:,} of {progress.steps:,}: loss {progress.loss:.4f}, "
            f"{rate:,.0f} tokens/s, {seconds * (progress.steps - progress.step):,.0f} s left"
        )
        if progress.evaluation is not None:
            text += f"; evaluation {progress.evaluation:.4f}"
        end = "\r" if is_terminal and progress.evaluation is None else "\n"
        print(text.ljust(100) if is_terminal else text, end=end, file=sys.stderr, flush=True)

    def finish(self) -> None:
        """The last word."""
        self.seconds = time.perf_counter() - self._start
        history = self._trainer.history
        print(
            f"{history.step:,} steps, loss {history.losses[-1]:.4f}, {self.seconds:,.1f} s".ljust(
                100
            ).rstrip(),
            file=sys.stderr,
        )
