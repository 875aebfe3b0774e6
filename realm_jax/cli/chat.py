"""`realm chat`: a conversation in the terminal."""

import json
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realm_jax.cli import options
from realm_jax.errors import RealmError

if TYPE_CHECKING:
    from realm_jax.cli.session import Status
    from realm_jax.llm import LLM, TextDelta
    from realm_jax.params import SamplingParams

HELP = """/help         this list
/reset        forget the conversation
/save FILE    write the conversation as JSON
/quit         leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def chat(
    *, system: options.System = None, sampling: options.SamplingFlags, engine: options.EngineFlags
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Example: realm chat --system "You are brief." --temperature 0.5
    """
    from realm_jax.cli.session import Status, open_model, sampling_params

    status = Status()
    llm = open_model(engine, status, max_num_seqs=1)
    llm.model.require_template()
    params = sampling_params(llm.model.metadata, sampling)
    Conversation(llm, params, system, status).run()


class Conversation:
    """The messages so far, and the loop that reads a line and streams an answer."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None, status: "Status") -> None:
        self._llm, self._params, self._status = llm, params, status
        self._opening: list[dict[str, Any]] = (
            [] if system is None else [{"role": "system", "content": system}]
        )
        self._messages = list(self._opening)

    def run(self) -> None:
        """Until Ctrl-D or /quit."""
        if sys.stdin.isatty():
            import readline  # noqa: F401  line editing and history for input()

            print("/help lists the commands", file=sys.stderr)
        while (line := self._read()) is not None:
            if line == "/quit":
                break
            if line.startswith("/"):
                print(self._command(line), file=sys.stderr)
            elif line:
                self._answer(line)

    def _read(self) -> str | None:
        """The next line; None at its end. Ctrl-C drops the line."""
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                print(file=sys.stderr)
                return None
            except KeyboardInterrupt:
                print(file=sys.stderr)

    def _command(self, line: str) -> str:
        """Runs a command and returns what to say."""
        name, _, argument = line.partition(" ")
        match name:
            case "/help":
                return HELP
            case "/reset":
                self._messages = list(self._opening)
                return "the conversation is forgotten"
            case "/save" if argument:
                return self._save(Path(argument.strip()).expanduser())
            case _:
                return f"unknown command {line!r}; /help lists them"

    def _save(self, path: Path) -> str:
        try:
            path.write_text(json.dumps(self._messages, ensure_ascii=False, indent=2) + "\n", "utf-8")
        except OSError as error:
            return f"not saved: {error}"
        return f"saved {len(self._messages)} messages to {path}"

    def _answer(self, line: str) -> None:
        """Stream the answer; what was said before Ctrl-C stays in the conversation."""
        messages = [*self._messages, {"role": "user", "content": line}]
        said = ""
        self._status.waiting()
        try:
            with _interrupts() as interrupted, closing(self._deltas(messages)) as deltas:
                for delta in deltas:
                    self._status.answering()
                    said += delta.text
                    print(delta.text, end="", flush=True)
                    if interrupted.is_set():
                        break
        except RealmError as error:
            print(f"error: {error}; /reset forgets the conversation", file=sys.stderr)
            return
        finally:
            self._status.answering()
        print()
        self._messages = [*messages, {"role": "assistant", "content": said}]

    def _deltas(self, messages: list[dict[str, Any]]) -> "Generator[TextDelta, None, None]":
        yield from self._llm.stream(self._llm.chat_prompt(messages), self._params)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """The event is set by Ctrl-C, which raises nothing here until it comes a second time.

    The engine hands its buffers to a call and takes them back: an exception between would lose them.
    """
    event = threading.Event()

    def interrupt(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
