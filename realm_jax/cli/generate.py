"""`realm generate`: one prompt, one answer."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.forms import FormFlags, read_form
from realm_jax.cli.processes import ProcessFlags, join
from realm_jax.cli.text import read_text
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.cli.session import Status
    from realm_jax.llm import LLM
    from realm_jax.serving.request import GenerationOutput, TextDelta

EXAMPLE = 'realm generate "What is the capital of France?" --temperature 0'


def generate(
    *,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from stdin.", metavar="PROMPT")
    ] = None,
    prompt_flag: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt, as a flag.", metavar="TEXT")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="A file that holds the prompt.", metavar="FILE")
    ] = None,
    system: options.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not apply the model's chat template.")] = False,
    sampling: options.SamplingFlags,
    form: FormFlags,
    num_samples: Annotated[int, typer.Option(help="Independent answers.", metavar="N")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="With --json: alternatives to report a token.", metavar="N")
    ] = None,
    engine: options.EngineFlags,
    processes: ProcessFlags,
) -> None:
    """Answer a prompt. The model's chat template is applied when it has one.

    Example: realm generate "What is the capital of France?" --temperature 0
    Example: realm generate "Invent a person." --json-schema person.json
    """
    text = _prompt_text(prompt, prompt_flag, file)
    if logprobs is not None and not as_json:
        raise RequestError("--logprobs needs --json")
    if raw and system is not None:
        raise RequestError("--system needs the chat template; remove --raw")
    structured = read_form(form)

    from realm_jax.cli.session import Status, open_model, sampling_params

    join(processes, engine)
    status = Status()
    llm = open_model(engine, status, max_num_seqs=min(max(num_samples, 1), 16))
    more = {"logprobs": logprobs, "n": num_samples, "structured_output": structured}
    params = sampling_params(llm.model.metadata, sampling, **more)
    ids = _prompt_ids(llm, text, system, raw)
    run = _Run(llm, llm.stream(ids, params), status)
    if as_json:
        run.finish()
        print(json.dumps(_as_json(run, logprobs is not None), ensure_ascii=False))
        return
    if num_samples == 1:
        for delta in run:
            print(delta.text, end="", flush=True)
        print()
    else:
        run.finish()
        for i, output in enumerate(run.outputs):
            print(f"--- sample {i + 1}\n{output.text}")
    print(run.summary(), file=sys.stderr)


def _prompt_text(*sources: str | Path | None) -> str:
    """The one prompt that was given."""
    given = [source for source in sources if source is not None]
    if len(given) != 1:
        raise RequestError(f"give the prompt once, as argument, with --prompt or with --file; e.g. {EXAMPLE}")
    text = read_text(given[0])
    if not text:
        raise RequestError(f"the prompt is empty; e.g. {EXAMPLE}")
    return text


def _prompt_ids(llm: "LLM", text: str, system: str | None, raw: bool) -> list[int]:
    if raw or (system is None and llm.model.template is None):
        return llm.tokenizer.encode(text, add_special=True, parse_special=True)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return llm.chat_prompt([*messages, {"role": "user", "content": text}])


class _Run:
    """Deltas as they come, and the timings of the whole."""

    def __init__(self, llm: "LLM", deltas: "Iterator[TextDelta]", status: "Status") -> None:
        self._llm, self._deltas, self._status = llm, deltas, status
        self.outputs: list[GenerationOutput] = []
        self.timings: dict[str, float] = {}

    def finish(self) -> None:
        """The run is over and nothing of it was shown."""
        for _ in self:
            pass

    def __iter__(self) -> "Iterator[TextDelta]":
        """Each delta; after the last one, `outputs` and `timings` stand."""
        compiled = self._llm.engine.programs
        start = time.perf_counter()
        first = first_compiled = None
        for delta in self._deltas:
            if first is None:
                first, first_compiled = time.perf_counter(), sum(compiled.values())
            self._status.answering()
            if delta.output is not None:
                self.outputs.append(delta.output)
            yield delta
        end, all_compiled = time.perf_counter(), sum(compiled.values())
        assert first is not None and first_compiled is not None
        self.outputs.sort(key=lambda output: output.sample_index)
        prefill = max(first - start - first_compiled, 1e-9)
        decode = max(end - first - (all_compiled - first_compiled), 1e-9)
        made = sum(output.usage.completion_tokens for output in self.outputs)
        self.timings = {
            "load_s": round(self._llm.model.seconds, 4),
            "compile_s": round(all_compiled, 4),
            "prefill_s": round(prefill, 4),
            "decode_s": round(decode, 4),
            "prefill_tps": round(self.outputs[0].usage.prompt_tokens / prefill, 2),
            "decode_tps": round(max(made - 1, 0) / decode, 2),
        }

    def summary(self) -> str:
        """One line for a person."""
        t = self.timings
        made = sum(output.usage.completion_tokens for output in self.outputs)
        return (
            f"{made} tokens at {t['decode_tps']:.1f}/s, prompt of {self.outputs[0].usage.prompt_tokens} in "
            f"{t['prefill_s']:.2f} s, load {t['load_s']:.2f} s, compile {t['compile_s']:.2f} s, "
            f"seed {self.outputs[0].seed}{self._guesses()}"
        )

    def _guesses(self) -> str:
        drafts = [output.metrics.drafts for output in self.outputs if output.metrics.drafts is not None]
        accepted, drafted = sum(d.accepted for d in drafts), sum(d.drafted for d in drafts)
        return f", {accepted} of {drafted} guesses accepted" if drafts else ""


def _as_json(run: _Run, with_logprobs: bool) -> dict[str, object]:
    """The contract's object; several samples stand under "samples", the first one also at the top."""
    samples = [_sample(output, with_logprobs) for output in run.outputs]
    first = run.outputs[0]
    whole: dict[str, object] = {
        **samples[0],
        "prompt_token_ids": first.prompt_token_ids,
        "seed": first.seed,
        "usage": {
            "prompt_tokens": first.usage.prompt_tokens,
            "completion_tokens": sum(output.usage.completion_tokens for output in run.outputs),
        },
        "timings": run.timings,
    }
    if len(samples) > 1:
        whole["samples"] = samples
    return whole


def _sample(output: "GenerationOutput", with_logprobs: bool) -> dict[str, object]:
    sample: dict[str, object] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
    }
    if output.metrics.drafts is not None:
        sample["drafts"] = output.metrics.drafts.json()
    if with_logprobs:
        sample["logprobs"] = output.logprobs
    return sample
