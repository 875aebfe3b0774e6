"""/v1/completions and /v1/chat/completions: a job's outputs as one answer, or as a stream of chunks."""

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from realm_jax.llm import LLM
from realm_jax.serving import answers
from realm_jax.serving.bodies import CHAT, COMPLETIONS, Task
from realm_jax.serving.calling import CallStream
from realm_jax.serving.request import GenerationOutput, TextDelta
from realm_jax.serving.server.connection import EventStream, while_connected
from realm_jax.serving.server.errors import JSON, api_error
from realm_jax.serving.server.jobs import Job, job_of, named_in
from realm_jax.serving.server.pooled_model import OpenModel
from realm_jax.serving.server.service import Service, note, service_of
from realm_jax.serving.server.tenancy import find_tenant
from realm_jax.serving.server.ticket import Ticket

SMALL = 64  # tokens of a chunk that is made on the event loop
COMPACT = (",", ":")


async def completions(request: Request) -> Response:
    """Texts that continue prompts."""
    return await _generate(request, COMPLETIONS)


async def chat_completions(request: Request) -> Response:
    """Answers to a conversation."""
    return await _generate(request, CHAT)


async def _generate(request: Request, url: str) -> Response:
    service, tenant = service_of(request), find_tenant(request)
    body = await service.read(request)
    async with service.using(named_in(body), tenant, request.receive) as model:
        return await _answer(request, url, body, model)


async def _answer(request: Request, url: str, body: Any, model: OpenModel) -> Response:
    service, llm = service_of(request), model.llm
    about = (llm, model.names, service.limits, model.tenant)
    job = await service.off_loop(job_of, url, body, *about)
    note(request, id=job.id, model=job.model, stream=job.stream)
    note(request, prompt_tokens=sum(len(r.prompt_ids) for r in job.requests))
    if service.log_prompts:
        note(request, prompts=[t.messages if t.messages is not None else t.prompt for t in job.tasks])
    if job.stream:
        return await _stream(request, service, job, model)

    async def answer() -> dict[str, Any]:
        ticket = await service.submit(model, job.requests)
        try:
            outputs = await ticket.outputs()
        finally:
            ticket.close()
        _note_ends(request, outputs)
        return await service.off_loop(whole_answer, job, outputs, llm)

    return JSON(await while_connected(request.receive, answer()))


async def _stream(request: Request, service: Service, job: Job, model: OpenModel) -> Response:
    ticket = await service.submit(model, job.requests)
    outputs: list[GenerationOutput] = []

    def close(how: str) -> None:
        ticket.close()
        _note_ends(request, outputs)
        note(request, ended=how)

    return EventStream(_chunks(service, job, ticket, model.llm, outputs), service.limits, close)


def _note_ends(request: Request, outputs: Sequence[GenerationOutput]) -> None:
    note(
        request,
        completion_tokens=sum(output.usage.completion_tokens for output in outputs),
        finish_reasons=sorted({str(output.finish_reason) for output in outputs}),
    )


def whole_answer(job: Job, outputs: Sequence[GenerationOutput], llm: LLM) -> dict[str, Any]:
    """The body that answers a job."""
    choices: list[dict[str, Any]] = []
    for i, (task, request) in enumerate(zip(job.tasks, job.requests, strict=True)):
        mine = [output for output in outputs if output.request_id == request.id]
        choices += answers.choices(task, mine, llm.tokenizer, i * job.samples)
    kind = "chat.completion" if job.url == CHAT else "text_completion"
    return _head(job, kind) | {"choices": choices, "usage": _usage(outputs)}


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model}


def _usage(outputs: Sequence[GenerationOutput]) -> dict[str, Any]:
    """Usage with the tokens of prompts that were reused: the first sample's, as a prompt counts once."""
    cached = sum(output.usage.cached_tokens for output in outputs if output.sample_index == 0)
    return answers.usage(outputs) | {"prompt_tokens_details": {"cached_tokens": cached}}


async def _chunks(
    service: Service, job: Job, ticket: Ticket, llm: LLM, outputs: list[GenerationOutput]
) -> AsyncIterator[str | None]:
    """The chunks of a job as JSON, None after silence; `outputs` grows by each sample that ends."""
    pieces = Pieces(job, llm)
    while not ticket.is_done:
        try:
            deltas = await ticket.take(service.limits.ping_seconds)
        except Exception as error:  # the answer has begun: its status cannot change any more
            yield json.dumps(api_error(error).body)
            return
        if not deltas:
            yield None
        for delta in deltas:
            if delta.output is not None:
                outputs.append(delta.output)
            if len(delta.token_ids) > SMALL:  # what a slow reader has missed
                chunk = await service.off_loop(pieces.chunk, delta)
            else:
                chunk = pieces.chunk(delta)
            if chunk is not None:
                yield chunk
    if job.include_usage:
        yield json.dumps(pieces.head | {"choices": [], "usage": _usage(outputs)}, separators=COMPACT)


class Pieces:
    """The pieces of each choice of a stream, which together are the whole answer's choices."""

    def __init__(self, job: Job, llm: LLM) -> None:
        self._job, self._tokenizer = job, llm.tokenizer
        self._places = {request.id: i for i, request in enumerate(job.requests)}
        self._offsets: dict[int, int] = {}  # of choices that have begun
        self._calls: dict[int, CallStream] = {}
        self.head = _head(job, "chat.completion.chunk" if job.url == CHAT else "text_completion")
        self.head |= {"usage": None} if job.include_usage else {}

    def chunk(self, delta: TextDelta) -> str | None:
        """The chunk of what the delta adds, as JSON; None if that is nothing to be seen."""
        choice = self.choice(delta)
        return None if choice is None else json.dumps(self.head | {"choices": [choice]}, separators=COMPACT)

    def choice(self, delta: TextDelta) -> dict[str, Any] | None:
        """What the delta adds to its choice; None if that is nothing to be seen."""
        place = self._places[delta.request_id]
        task, request = self._job.tasks[place], self._job.requests[place]
        index = place * self._job.samples + delta.sample_index
        calls = self._calls_of(task, index, delta)
        adds = bool(delta.text) if calls is None else calls.push(delta)
        if not adds and not delta.logprobs and delta.output is None:
            return None
        is_first = index not in self._offsets
        if is_first and task.echo:
            opening = answers.echoed(task, request.prompt_ids, self._tokenizer)
            delta = replace(delta, text=opening + delta.text)
        choice, self._offsets[index] = answers.chunk_choice(
            task,
            delta,
            self._tokenizer,
            index=index,
            offset=self._offsets.get(index, 0),
            is_first=is_first,
            calls=calls,
        )
        return choice

    def _calls_of(self, task: Task, index: int, delta: TextDelta) -> CallStream | None:
        """What reads this choice; None where it has no calls."""
        if task.calling is not None and index not in self._calls:
            self._calls[index] = task.calling.stream(delta.request_id, delta.sample_index)
        return self._calls.get(index)
