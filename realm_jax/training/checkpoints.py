"""A training on disk: what a step changes and how it went so far, whole or not at all."""

import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from realm_jax.errors import ModelFileError, RequestError
from realm_jax.training.step import State
from realm_jax.training.targets import Factors

OURS = re.compile(r"\d+(\.orbax-checkpoint-tmp.*)?")
"""Names of checkpoints, whole ones and those that were never finished."""


@dataclass
class History:
    """How a training went so far.

    losses: of each step, the mean over its targets. evaluations: (step, mean loss).
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def best(self) -> tuple[int, float] | None:
        """The first evaluation that no other betters."""
        return min(self.evaluations, key=lambda each: each[1], default=None)

    @property
    def since_best(self) -> int:
        """Evaluations after the best one."""
        return 0 if self.best is None else len(self.evaluations) - 1 - self.evaluations.index(self.best)


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds. best: the factors of the best evaluation, where there are evaluations."""

    state: State
    best: Factors | None
    history: History


class Checkpoints:
    """The checkpoints of one training, in a folder of their own; the newest is kept.

    about: what makes trainings the same, as JSON; only the same one is continued.
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._folder, self._about = folder.absolute(), about

    def latest(self) -> int | None:
        """The step of the newest checkpoint; None without any."""
        return latest_step(self._folder)

    def save(self, saved: Saved) -> None:
        """The checkpoint is on disk, and older ones are gone."""
        step = saved.history.step
        if self.latest() == step:
            return
        about = {"about": self._about, "history": asdict(saved.history)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_tree(saved)), json=ocp.args.JsonSave(about))  # pyright: ignore[reportCallIssue]
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            try:
                checkpointer.save(self._folder / str(step), args=args)
            except (OSError, ValueError) as error:
                raise RequestError(f"{self._folder}: no checkpoint can be written: {error}") from error
        for other in self._folder.iterdir():
            if other.name != str(step) and OURS.fullmatch(other.name):
                shutil.rmtree(other, ignore_errors=True)

    def load(self, like: Saved) -> Saved:
        """The newest checkpoint, `like` in structure and shapes.

        Raises RequestError if another training wrote it, ModelFileError if it is broken.
        """
        folder = self._folder / str(self.latest())
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            try:
                found = checkpointer.restore(folder, args=ocp.args.Composite(json=ocp.args.JsonRestore()))  # pyright: ignore[reportCallIssue]
                about, history = found.json["about"], found.json["history"]
            except Exception as error:  # whatever the library makes of a broken folder
                raise _broken(folder, error) from error
            self._check(about)
            abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))  # pyright: ignore[reportCallIssue]
            try:
                tree = checkpointer.restore(folder, args=args).state
            except Exception as error:
                raise _broken(folder, error) from error
        evaluations = [(int(step), float(loss)) for step, loss in history["evaluations"]]
        state = State(tree["factors"], tree["optimizer"])
        return Saved(state, tree.get("best"), History(history["losses"], evaluations))

    def _check(self, about: dict[str, Any]) -> None:
        for name, mine in self._about.items():
            if (theirs := about.get(name)) != mine:
                raise RequestError(
                    f"the training in {self._folder.parent} began with {name} {theirs!r}, not {mine!r} "
                    "(continue it as it began, or give another folder)"
                )


def latest_step(folder: Path) -> int | None:
    """The step of the newest checkpoint in a folder; None without any."""
    if not folder.is_dir():
        return None
    # what was being written when a process ended has a longer name
    return max((int(f.name) for f in folder.iterdir() if f.name.isdecimal()), default=None)


def _tree(saved: Saved) -> dict[str, Any]:
    tree = {"factors": saved.state.factors, "optimizer": saved.state.optimizer}
    return tree if saved.best is None else tree | {"best": saved.best}


def _broken(folder: Path, error: Exception) -> ModelFileError:
    reason = " ".join(str(error).split())[:200]
    return ModelFileError(f"the checkpoint {folder} is broken: {reason} (delete it to begin anew)")
