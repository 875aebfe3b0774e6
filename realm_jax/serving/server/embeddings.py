"""/v1/embeddings: the mean of a text's last hidden states, of length 1.

What a model that was trained to write gives: texts alike are near each other, less reliably than by a model
that was trained for it.
"""

import base64
import secrets
from typing import Any

import numpy as np
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from realm_jax.errors import RequestError
from realm_jax.params import SamplingParams
from realm_jax.serving.bodies import checked_prompt
from realm_jax.serving.request import GenerationOutput, Request, chosen_adapters
from realm_jax.serving.server.connection import while_connected
from realm_jax.serving.server.errors import JSON
from realm_jax.serving.server.jobs import named_in, prompts_of
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.pooled_model import OpenModel
from realm_jax.serving.server.schemas import EmbeddingBody, checked
from realm_jax.serving.server.service import note, service_of
from realm_jax.serving.server.tenancy import find_tenant, visible


async def embeddings(request: HTTPRequest) -> Response:
    """Vectors of texts."""
    service, tenant = service_of(request), find_tenant(request)
    value = await service.read(request)
    async with service.using(named_in(value), tenant, request.receive) as model:
        return await _answer(request, value, model)


async def _answer(request: HTTPRequest, value: Any, model: OpenModel) -> Response:
    service = service_of(request)
    body, name, requests = await service.off_loop(_read, value, model, service.limits)
    note(request, model=name, prompt_tokens=sum(len(r.prompt_ids) for r in requests))

    async def answer() -> dict[str, Any]:
        ticket = await service.submit(model, requests)
        try:
            outputs = await ticket.outputs()
        finally:
            ticket.close()
        return await service.off_loop(_body, body, name, outputs)

    return JSON(await while_connected(request.receive, answer()))


def _read(value: Any, model: OpenModel, limits: Limits) -> tuple[EmbeddingBody, str, list[Request]]:
    """The body, the name of what answers it, and a request for each text."""
    body, llm, tenant = checked(EmbeddingBody, value), model.llm, model.tenant
    adapters = visible(tenant, llm.engine.adapters.named)
    name = model.names.resolve(body.model, adapters, tenant)
    if body.dimensions not in (None, llm.model.config.hidden_size):
        raise RequestError(f"dimensions is not {llm.model.config.hidden_size}, which this model has")
    chosen = tenant.chosen_adapters(chosen_adapters(name if name in adapters else None) or None)
    id = f"embd-{secrets.token_hex(12)}"
    texts = prompts_of(body.input, "input", limits)
    params = SamplingParams(max_tokens=0)
    requests = [
        Request(
            f"{id}-{i}",
            tuple(llm.prompt_ids(checked_prompt(text, "input"))),
            params,
            0,
            tenant=tenant.name,
            weight=tenant.weight,
            adapters=chosen,
            embeds=True,
        )
        for i, text in enumerate(texts)
    ]
    return body, name, requests


def _body(body: EmbeddingBody, model: str, outputs: list[GenerationOutput]) -> dict[str, Any]:
    tokens = sum(output.usage.prompt_tokens for output in outputs)
    data = [
        {"object": "embedding", "index": i, "embedding": _written(output, body.encoding_format)}
        for i, output in enumerate(outputs)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _written(output: GenerationOutput, form: str | None) -> list[float] | str | None:
    """The vector as numbers, or as little-endian float32 in base64, which OpenAI's client asks for."""
    if form != "base64" or output.embedding is None:
        return output.embedding
    return base64.b64encode(np.array(output.embedding, "<f4").tobytes()).decode("ascii")
