"""Offline jobs: a file of requests in, a file of responses out, restartable at any moment.

Lines are OpenAI's batch lines, `{"custom_id", "method", "url", "body"}` for /v1/completions and
/v1/chat/completions, or short ones, `{"id"?, "prompt" | "messages", ...sampling}`. A bad line becomes an
error line and stops nothing.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from realm_jax import __version__
from realm_jax.errors import RealmError, RequestError, UnsupportedError
from realm_jax.gguf.checkpoint import standing_for
from realm_jax.llm import LLM
from realm_jax.serving.answers import response_body
from realm_jax.serving.bodies import Task, read_task
from realm_jax.serving.request import GenerationOutput, Request

QUEUE = 64  # requests handed to the engine ahead of free slots


@dataclass(frozen=True)
class Line:
    """One line of the input: its name, and what is asked or why it cannot be."""

    custom_id: str
    task: Task | RealmError


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int
    total: int
    errors: int
    tokens: int


class BatchJob:
    """One input file, one output file, and the manifest beside it that says how it was made."""

    def __init__(
        self, llm: LLM, source: Path, target: Path, *, seed: int = 0, shard: tuple[int, int] = (1, 1)
    ) -> None:
        self._llm, self._source, self._target, self._seed, self._shard = llm, source, target, seed, shard

    @property
    def manifest_path(self) -> Path:
        return self._target.with_name(self._target.name + ".manifest.json")

    def run(
        self,
        *,
        resume: bool = False,
        retry_errors: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Progress:
        """Every line of the shard has one line in the output; returns the final count.

        Raises RequestError if the output exists and `resume` is off, or was made by another job.
        """
        lines = list(read_lines(self._source, self._shard))
        done = self._start(resume, retry_errors)
        progress = Progress(len(done), len(lines), 0, 0)
        with self._target.open("a", encoding="utf-8") as out:
            for result in self._results([line for line in lines if line.custom_id not in done]):
                _append(out, result)
                tokens = (
                    0 if result["response"] is None else result["response"]["body"]["usage"]["total_tokens"]
                )
                errors = progress.errors + (result["error"] is not None)
                progress = Progress(progress.done + 1, len(lines), errors, progress.tokens + tokens)
                on_progress(progress)
        return progress

    def order_output(self) -> None:
        """The output's lines stand in the input's order."""
        place = {line.custom_id: i for i, line in enumerate(read_lines(self._source, self._shard))}
        rows = sorted(_read_results(self._target), key=lambda row: place[row["custom_id"]])
        _rewrite(self._target, rows)

    def _results(self, lines: list[Line]) -> Iterator[dict[str, Any]]:
        """Results as they come, long prompts first: the last to finish are then short."""
        requests: list[tuple[str, Task, Request]] = []
        for line in lines:
            try:
                if isinstance(line.task, RealmError):
                    raise line.task
                task = line.task.fitted(self._llm)
                requests.append((line.custom_id, task, self._request(line.custom_id, task)))
            except RealmError as error:
                yield _error(line.custom_id, error)
        requests.sort(key=lambda each: -len(each[2].prompt_ids))
        yield from self._generate(requests)

    def _generate(self, requests: list[tuple[str, Task, Request]]) -> Iterator[dict[str, Any]]:
        waiting, tasks = iter(requests), {request.id: task for _, task, request in requests}
        parts: dict[str, list[GenerationOutput]] = {}
        engine, queued, more = self._llm.engine, 0, True
        while more or queued:
            while more and queued < QUEUE:
                if (following := next(waiting, None)) is None:
                    more = False
                    break
                try:
                    engine.add_request(following[2])
                    queued += 1
                except (RequestError, UnsupportedError) as error:
                    yield _error(following[0], error)
            for delta in engine.step():
                if delta.output is None:
                    continue
                outputs = parts.setdefault(delta.request_id, [])
                outputs.append(delta.output)
                task = tasks[delta.request_id]
                if len(outputs) == task.params.n:
                    queued -= 1
                    outputs = parts.pop(delta.request_id)
                    body = response_body(task, outputs, self._llm.tokenizer, self._llm.model.path.name)
                    yield {
                        "custom_id": delta.request_id,
                        "response": {"status_code": 200, "body": body},
                        "error": None,
                    }

    def _request(self, custom_id: str, task: Task) -> Request:
        seed = task.params.seed
        if seed is None:
            digest = hashlib.sha256(f"{self._seed}\n{custom_id}".encode()).digest()
            seed = int.from_bytes(digest[:7], "big")
        ids, adapters = tuple(task.prompt_ids(self._llm)), task.adapters(self._llm.engine.adapters.named)
        return Request(custom_id, ids, task.params, seed, adapters=adapters)

    def _start(self, resume: bool, retry_errors: bool) -> set[str]:
        """The ids that are done already; the output is whole and the manifest stands."""
        manifest = self._manifest()
        if not self._target.exists():
            self.manifest_path.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
            return set()
        if not resume:
            raise RequestError(f"{self._target} exists; continue it with --resume or choose another output")
        _check_manifest(self.manifest_path, manifest)
        rows = _read_results(self._target)
        if retry_errors:
            rows = [row for row in rows if row["error"] is None]
        _rewrite(self._target, rows)
        return {row["custom_id"] for row in rows}

    def _manifest(self) -> dict[str, Any]:
        model = self._llm.model
        return {
            "realm_jax": __version__,
            "model_sha256": _sha256(standing_for(model.path)),
            "input_sha256": _sha256(self._source),
            "dtype": model.numerics.dtype,
            "kv_dtype": model.numerics.kv_dtype,
            "weights": model.numerics.weights,
            "kernels": model.numerics.kernels,
            "ctx_size": model.context,
            "adapters": self._llm.adapter_digests(),
            "seed": self._seed,
            "shard": list(self._shard),
        }


def read_lines(source: Path, shard: tuple[int, int]) -> Iterator[Line]:
    """The shard's lines: number i of those that are not blank belongs to shard i % N + 1.

    A line whose id stood before is an error line under an id of its own.
    """
    index, count = shard
    seen: set[str] = set()
    with source.open(encoding="utf-8", errors="surrogateescape") as file:
        numbered = ((number, text) for number, text in enumerate(file, 1) if text.strip())
        for place, (number, text) in enumerate(numbered):
            line = _read_line(number, text)
            if line.custom_id in seen:
                error = RequestError(
                    f"line {number}: id {line.custom_id!r} stood before; ids must be distinct"
                )
                line = Line(f"line-{number}", error)
            seen.add(line.custom_id)
            if place % count == index - 1:
                yield line


def _read_line(number: int, text: str) -> Line:
    custom_id = f"line-{number}"
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise RequestError(f"line {number} is no JSON object")
        given = value.get("custom_id", value.get("id"))
        if given is not None:
            if not isinstance(given, str | int) or isinstance(given, bool) or len(str(given)) > 512:
                raise RequestError(f"line {number}: the id must be a string of at most 512 characters")
            custom_id = str(given)
        return Line(custom_id, read_task(value))
    except RealmError as error:
        return Line(custom_id, error)
    except (ValueError, RecursionError) as error:
        return Line(custom_id, RequestError(f"line {number} is no JSON: {error}"))


def _error(custom_id: str, error: RealmError) -> dict[str, Any]:
    message = " ".join(str(error).split())
    return {
        "custom_id": custom_id,
        "response": None,
        "error": {"code": type(error).__name__, "message": message},
    }


def _append(out: IO[str], row: Mapping[str, Any]) -> None:
    out.write(json.dumps(row) + "\n")
    out.flush()


def _read_results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an output; a last line that was torn off is left out."""
    rows = []
    for text in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict) and {"custom_id", "response", "error"} <= row.keys():
            rows.append(row)
    return list({row["custom_id"]: row for row in rows}.values())


def _rewrite(path: Path, rows: list[dict[str, Any]]) -> None:
    """The file holds exactly these rows, whatever moment the process is killed at."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row) + "\n")
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(path)


def _check_manifest(path: Path, wanted: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: no readable manifest, so its job cannot be resumed: {error}") from error
    if differing := [key for key, value in wanted.items() if found.get(key) != value]:
        key = differing[0]
        raise RequestError(
            f"{path}: the output was made with {key} {found.get(key)!r}, this job has {wanted[key]!r}; "
            "choose another output"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
