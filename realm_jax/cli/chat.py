"""`realm chat`: a conversation in the terminal."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realm_jax.cli import options

if TYPE_CHECKING:
    from realm_jax.cli.session import Status
    from realm_jax.llm import LLM
    from realm_jax.params import SamplingParams

HELP = """/help         this list
/reset        forget the conversation
/save FILE    write the conversation as JSON
/quit         leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def chat(
    model: options.Model = None,
    system: options.System = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repeat_penalty: options.RepeatPenalty = None,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ctx_size: options.CtxSize = None,
    threads: options.Threads = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    weights: options.Weights = "auto",
    kv_dtype: options.KVDType = "auto",
    offline: options.Offline = False,
    config: options.Config = None,
    verbose: options.Verbose = False,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    Example: realm chat --system "You are brief." --temperature 0.5
    """
    from realm_jax.cli.session import Status, open_model, sampling_params

    status = Status()
    llm = open_model(
        model,
        status,
        ctx_size=ctx_size,
        threads=threads,
        device=device,
        dtype=dtype,
        weights=weights,
        kv_dtype=kv_dtype,
        offline=offline,
        max_num_seqs=1,
    )
    llm.model.require_template()
    params = sampling_params(
        llm.model.metadata,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repeat_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
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
                return self._save(Path(argument.strip()))
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
        from realm_jax.errors import RequestError

        messages = [*self._messages, {"role": "user", "content": line}]
        said = ""
        try:
            deltas = self._llm.stream(self._llm.chat_prompt(messages), self._params)
            try:
                for delta in deltas:
                    self._status.clear()
                    said += delta.text
                    print(delta.text, end="", flush=True)
            except KeyboardInterrupt:
                deltas.close()  # pyright: ignore[reportAttributeAccessIssue]: a generator; aborts the request
        except RequestError as error:
            print(f"error: {error}", file=sys.stderr)
            return
        print()
        self._messages = [*messages, {"role": "assistant", "content": said}]
