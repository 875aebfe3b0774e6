"""A request's body to what the engine runs: the one place that makes requests of bodies.

Slow for long prompts (templates, tokenization): called off the event loop.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from realm_jax.errors import RequestError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams
from realm_jax.serving import bodies
from realm_jax.serving.bodies import CHAT, COMPLETIONS, Task
from realm_jax.serving.request import Request
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.schemas import ChatBody, CompletionBody, GenerationBody, checked
from realm_jax.serving.server.tenancy import visible
from realm_jax.serving.tenants import Tenant

KINDS: dict[str, type[GenerationBody]] = {COMPLETIONS: CompletionBody, CHAT: ChatBody}
TRANSPORT = ("stream", "stream_options", "priority", "cache_salt")
"""Fields that are not the task's: how it is answered, and beside whom it runs."""
MAX_SALT, MAX_PRIORITY = 200, 1000


@dataclass(frozen=True)
class Job:
    """What one body asks for: tasks, one a prompt, and the engine's request for each."""

    id: str
    model: str
    created: int
    tasks: tuple[Task, ...]
    requests: tuple[Request, ...]
    stream: bool
    include_usage: bool

    @property
    def url(self) -> str:
        return self.tasks[0].url

    @property
    def samples(self) -> int:
        """How many choices each prompt has."""
        return self.tasks[0].params.n


def named_in(body: object) -> object:
    """The model that a body names, if it is one."""
    return body.get("model") if isinstance(body, dict) else None


def job_of(url: str, value: Any, llm: LLM, names: ModelNames, limits: Limits, tenant: Tenant) -> Job:
    """The job of a body. Raises ApiError, RequestError or UnsupportedError that name the field."""
    body = checked(KINDS[url], value)
    given = body.model_dump(exclude_unset=True)
    adapters = visible(tenant, llm.engine.adapters.named)
    model = names.resolve(body.model, adapters, tenant)
    transport = {name: given.pop(name, None) for name in TRANSPORT}
    tasks = tuple(task.fitted(llm) for task in _tasks(url, _opened(given, tenant), limits))
    stream = bool(body.stream)
    _check_transport(body, tasks[0], stream)
    id = f"{'chatcmpl' if url == CHAT else 'cmpl'}-{secrets.token_hex(12)}"
    requests = []
    for i, task in enumerate(tasks):
        seed = secrets.randbits(32) if task.params.seed is None else task.params.seed
        prompt = tuple(task.prompt_ids(llm))
        requests.append(
            Request(
                f"{id}-{i}",
                prompt,
                _allowed(task.params, len(prompt), tenant, llm.model.context),
                seed,
                priority=transport["priority"] or 0,
                tenant=tenant.name,
                weight=tenant.weight,
                adapters=tenant.chosen_adapters(task.adapters(adapters) or None),
                cache_salt=transport["cache_salt"] or "",
            )
        )
    if (form := tasks[0].params.structured_output) is not None:
        llm.engine.grammars.compile(form)  # here, so that the engine's thread finds it made
    _check_size(requests, llm.model.context, limits)
    usage = body.stream_options is not None and body.stream_options.include_usage
    return Job(id, model, int(time.time()), tasks, tuple(requests), stream, usage)


def _opened(given: dict[str, Any], tenant: Tenant) -> dict[str, Any]:
    """The body; a chat that brings no system message has the tenant's."""
    messages = given.get("messages")
    if tenant.system_prompt is None or not isinstance(messages, list):
        return given
    if any(isinstance(message, dict) and message.get("role") == "system" for message in messages):
        return given
    return given | {"messages": [{"role": "system", "content": tenant.system_prompt}, *messages]}


def _allowed(params: SamplingParams, prompt: int, tenant: Tenant, context: int) -> SamplingParams:
    """The parameters, within what the tenant may have. Raises RequestError for a request beyond it."""
    if tenant.max_tokens is tenant.max_context_tokens is tenant.tokens_per_minute is None:
        return params
    return replace(params, max_tokens=tenant.new_tokens(prompt, params.max_tokens, context, params.n))


def _tasks(url: str, given: dict[str, Any], limits: Limits) -> tuple[Task, ...]:
    """One task for each prompt; a conversation is one."""
    if url == CHAT:
        tasks = (bodies.read_body(url, given),)
    else:
        prompts = prompts_of(given["prompt"], "prompt", limits)
        first = bodies.read_body(url, given | {"prompt": prompts[0]})
        tasks = (first, *(replace(first, prompt=bodies.checked_prompt(p)) for p in prompts[1:]))
    n = tasks[0].params.n
    if n > limits.n:
        raise RequestError(f"n is {n:,}; the limit is {limits.n:,}")
    if len(tasks) * n > limits.sequences:
        raise RequestError(
            f"prompt and n ask for {len(tasks) * n:,} answers; the limit is {limits.sequences:,}"
        )
    return tasks


def prompts_of(given: object, name: str, limits: Limits) -> list[Any]:
    """The prompts of a field, which may hold one or a list of them. Raises RequestError for too many."""
    if not isinstance(given, list) or not given or not isinstance(given[0], str | list):
        return [given]
    if len(given) > limits.prompts:
        raise RequestError(f"{name} has {len(given):,} entries; the limit is {limits.prompts:,}")
    return given


def _check_transport(body: GenerationBody, task: Task, stream: bool) -> None:
    if body.stream_options is not None and not stream:
        raise RequestError("stream_options is for streams alone; set stream, or leave it out")
    if stream and (body.prompt_logprobs is not None or (task.echo and task.params.logprobs is not None)):
        raise RequestError("stream: log-probabilities of the prompt come only with a whole answer")
    if body.priority is not None and not 0 <= body.priority <= MAX_PRIORITY:
        raise RequestError(f"priority is {body.priority}; it must be from 0 to {MAX_PRIORITY}")
    if len(body.cache_salt or "") > MAX_SALT:
        raise RequestError(
            f"cache_salt has {len(body.cache_salt or ''):,} characters; the limit is {MAX_SALT}"
        )


def _check_size(requests: Sequence[Request], context: int, limits: Limits) -> None:
    """The answer fits in memory: log-probabilities are most of a large one."""
    total = 0
    for request in requests:
        params, length = request.params, len(request.prompt_ids)
        new = context if params.max_tokens is None else min(params.max_tokens, context)
        if params.prompt_logprobs is not None:
            total += params.n * length * (1 + params.prompt_logprobs)
        if params.logprobs is not None:
            total += params.n * new * (1 + params.logprobs)
    if total > limits.logprobs:
        raise RequestError(
            f"logprobs: the answer may have {total:,}; the limit is {limits.logprobs:,} "
            "(ask for fewer prompts, tokens or alternatives)"
        )
