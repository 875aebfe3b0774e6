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
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams
from realm_jax.serving.bodies import checked_prompt
from realm_jax.serving.request import GenerationOutput, Request, chosen_adapters
from realm_jax.serving.server.connection import while_connected
from realm_jax.serving.server.errors import JSON
from realm_jax.serving.server.jobs import prompts_of
from realm_jax.serving.server.reading import parsed, read_body
from realm_jax.serving.server.schemas import EmbeddingBody, checked
from realm_jax.serving.server.service import Service, note, service_of
from realm_jax.serving.server.tenancy import find_tenant, visible
from realm_jax.serving.tenants import Tenant


async def embeddings(request: HTTPRequest) -> Response:
    """Vectors of texts."""
    service, tenant = service_of(request), find_tenant(request)
    llm = service.require_llm()
    raw = await read_body(request, service.limits)
    body, model, requests = await service.off_loop(_read, raw, llm, service, tenant)
    note(request, model=model, prompt_tokens=sum(len(r.prompt_ids) for r in requests))

    async def answer() -> dict[str, Any]:
        ticket = await service.submit(requests, tenant)
        try:
            outputs = await ticket.outputs()
        finally:
            ticket.close()
        return await service.off_loop(_body, body, model, outputs)

    return JSON(await while_connected(request.receive, answer()))


def _read(raw: bytes, llm: LLM, service: Service, tenant: Tenant) -> tuple[EmbeddingBody, str, list[Request]]:
    """The body, the name of what answers it, and a request for each text."""
    body = checked(EmbeddingBody, parsed(raw, service.limits))
    adapters = visible(tenant, llm.engine.adapters.named)
    model = service.names.resolve(body.model, adapters, tenant)
    if body.dimensions not in (None, llm.model.config.hidden_size):
        raise RequestError(f"dimensions is not {llm.model.config.hidden_size}, which this model has")
    chosen = tenant.chosen_adapters(chosen_adapters(model if model in adapters else None) or None)
    id = f"embd-{secrets.token_hex(12)}"
    texts = prompts_of(body.input, "input", service.limits)
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
    return body, model, requests


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
