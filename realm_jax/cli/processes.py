"""Several processes that run one command together, on the devices of all of them."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from realm_jax.cli.flags import flag
from realm_jax.cli.options import EngineFlags
from realm_jax.errors import RequestError


@dataclass(frozen=True)
class ProcessFlags:
    """How this process finds the others of its run."""

    coordinator: Annotated[
        str | None,
        flag("--coordinator", "With --mesh over several hosts: process 0's address.", metavar="HOST:PORT"),
    ] = None
    num_processes: Annotated[
        int | None, flag("--num-processes", "With --coordinator: how many there are.", metavar="N")
    ] = None
    process_id: Annotated[
        int | None, flag("--process-id", "With --coordinator: which this is, from 0.", metavar="I")
    ] = None
    distributed: Annotated[
        Literal["off", "auto"],
        flag("--distributed", "auto: SLURM or the TPU pod says which processes there are."),
    ] = "off"


def join(flags: ProcessFlags, engine: EngineFlags) -> bool:
    """Whether this is the process that writes results; of others, nothing but errors is shown.

    Raises RequestError for flags that contradict each other, and where the others are not found.
    """
    named = (flags.coordinator, flags.num_processes, flags.process_id)
    is_auto = flags.distributed == "auto"
    if not is_auto and all(value is None for value in named):
        return True
    if engine.mesh is None:
        raise RequestError("several processes need --mesh tp=N, with N the devices of all of them")
    if is_auto and named != (None, None, None):
        raise RequestError("--distributed auto finds the coordinator itself; leave one of both out")
    if not is_auto and None in named:
        raise RequestError("--coordinator, --num-processes and --process-id go together; give all three")

    from realm_jax import runtime

    _keep_results_apart()
    runtime.join_processes(*named)
    if runtime.process_index() == 0:
        return True
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    return False


def _keep_results_apart() -> None:
    """What libraries print of their connections goes to stderr: stdout has results alone."""
    kept = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace")
