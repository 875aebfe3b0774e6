"""What every command that runs a model does first: load it with progress, read the file's own hints."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from realm_jax.cli.options import EngineFlags, SamplingFlags, adapters, memory_bytes
from realm_jax.cli.text import size
from realm_jax.errors import ModelFileError, RequestError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams

CLI_SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.0}
FILE_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


class Progress(Protocol):
    """Who hears how far loading is, and what it has to say."""

    def loading(self, done: int, total: int) -> None: ...
    def loaded(self) -> None: ...
    def compiling(self, program: str) -> None: ...
    def notice(self, text: str) -> None: ...


class Status:
    """Progress on stderr: a bar and a changing line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._spinner = self._console.status("") if self._console.is_terminal else None
        self._progress: Bar | None = None
        self._task: TaskID | None = None
        self._is_answering = False

    def loading(self, done: int, total: int) -> None:
        """Bytes of weights that have been read."""
        if not self._console.is_terminal:
            if self._task is None:
                self._task = TaskID(0)
                print(f"loading {size(total)}", file=sys.stderr)
            return
        if self._progress is None:
            columns = (TextColumn("loading"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._progress = Bar(*columns, console=self._console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task("loading", total=total)
        assert self._task is not None
        self._progress.update(self._task, completed=done)

    def loaded(self) -> None:
        """Nothing of the bar stays on the terminal."""
        if self._progress is not None:
            self._progress.stop()

    def compiling(self, program: str) -> None:
        """A program runs for the first time."""
        if self._spinner is None:
            print(f"compiling {program}", file=sys.stderr)
        elif not self._is_answering:  # a changing line would wipe the line that the answer has begun
            self._spinner.update(f"compiling {program}")
            self._spinner.start()

    def notice(self, text: str) -> None:
        """Something that the user should know."""
        print(f"note: {text}", file=sys.stderr)

    def waiting(self) -> None:
        """Progress may be shown."""
        self._is_answering = False

    def answering(self) -> None:
        """Nothing of the progress stays on the terminal, and no more comes: it is the answer's now."""
        self._is_answering = True
        if self._spinner is not None:
            self._spinner.stop()


def open_model(flags: EngineFlags, status: Progress, *, names_adapters: bool = False, **config: Any) -> LLM:
    """The model, loaded with progress to `status`.

    names_adapters: whether requests can name adapters. config: further fields of `EngineConfig`.
    """
    options = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    options |= config | {"memory": memory_bytes(flags.memory)} | adapters(flags.lora)
    if options["lora"] and not names_adapters:
        name, path = next(iter(options["lora"].items()))
        raise RequestError(
            f"--lora {name}={path}: nothing here can name an adapter; fold it with --lora {path}"
        )
    try:
        return LLM(
            options.pop("model"),
            on_load=status.loading,
            on_compile=status.compiling,
            on_notice=status.notice,
            **options,
        )
    finally:
        status.loaded()


def sampling_params(metadata: Mapping[str, Any], flags: SamplingFlags, **more: Any) -> SamplingParams:
    """Flags where given, else the file's own hints, else the CLI's defaults."""
    values = {field.name: getattr(flags, field.name) for field in dataclasses.fields(flags)}
    values["stop"] = tuple(flags.stop or ())
    for name, default in CLI_SAMPLING.items():
        if values[name] is None:
            values[name] = _hint(metadata, name, default)
    return SamplingParams(**values, **more)


def _hint(metadata: Mapping[str, Any], name: str, default: float) -> Any:
    """The file's value of a sampling parameter. Raises ModelFileError for one that is out of range."""
    key = FILE_SAMPLING[name]
    value = metadata.get(key, default)
    try:
        if not isinstance(value, int | float):
            raise RequestError(f"{name} is {value!r}; it must be a number")
        SamplingParams(**{name: value})  # pyright: ignore[reportArgumentType]: one of the numbers above
    except RequestError as error:
        raise ModelFileError(f"the model file's hint {key}: {error} (a flag overrides it)") from error
    return value
