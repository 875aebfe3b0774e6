"""The small routes: what is served, tokens of texts, health and metrics."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from realm_jax import __version__
from realm_jax.errors import RequestError
from realm_jax.llm import LLM
from realm_jax.serving.bodies import template_variables
from realm_jax.serving.server import metrics
from realm_jax.serving.server.errors import JSON, RETRY_SECONDS, no_such_model
from realm_jax.serving.server.jobs import named_in
from realm_jax.serving.server.pooled_model import PooledModel
from realm_jax.serving.server.schemas import B, DetokenizeBody, TemplateBody, TokenizeBody, checked
from realm_jax.serving.server.service import Service, service_of
from realm_jax.serving.server.tenancy import find_tenant, visible
from realm_jax.serving.tenants import ANONYMOUS, Tenant
from realm_jax.tools import read_tools


async def models(request: Request) -> Response:
    """All models under their names, and their adapters under theirs."""
    return JSON({"object": "list", "data": _models(service_of(request), find_tenant(request))})


async def model(request: Request) -> Response:
    """One of them."""
    service, tenant, name = service_of(request), find_tenant(request), request.path_params["name"]
    found = _models(service, tenant)
    if (entry := next((each for each in found if each["id"] == name), None)) is None:
        raise no_such_model(name)
    return JSON(entry)


def _models(service: Service, tenant: Tenant) -> list[dict[str, Any]]:
    service.check_serving()
    return [entry for model in service.pool.models for entry in _entries(model, service.started, tenant)]


def _entries(model: PooledModel, created: int, tenant: Tenant) -> list[dict[str, Any]]:
    """The model under its names, and its adapters; the status is in the words of llama-server."""

    def entry(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "realm",
            "root": model.name,
            "parent": parent,
            "max_model_len": model.context,
            "status": {"value": model.status} | ({"failed": True} if model.has_failed else {}),
        }

    adapters = [entry(name, model.name) for name in model.visible_adapters(tenant)]
    return [entry(name, None) for name in model.names.visible(tenant)] + adapters


async def tokenize(request: Request) -> Response:
    """The tokens of a text or a conversation."""
    return await _answer(request, TokenizeBody, _tokenize)


def _tokenize(body: TokenizeBody, llm: LLM) -> dict[str, Any]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("give one of prompt and messages")
    if body.prompt is not None:
        ids = llm.tokenizer.encode(body.prompt, add_special=body.add_special_tokens, parse_special=True)
    else:
        tools = read_tools({"tools": body.tools})
        ids = llm.chat_prompt(body.messages, tools=tools, **template_variables(body.chat_template_kwargs))
    found: dict[str, Any] = {"count": len(ids), "max_model_len": llm.model.context, "tokens": ids}
    if body.return_token_strs:
        found["token_strs"] = [llm.tokenizer.token_text(token) for token in ids]
    return found


async def detokenize(request: Request) -> Response:
    """The text of tokens."""
    return await _answer(request, DetokenizeBody, lambda b, llm: {"prompt": llm.tokenizer.decode(b.tokens)})


async def tokenizer_info(request: Request) -> Response:
    """What a client needs to know of the tokenizer that /tokenize is, as vLLM says it: of ?model=NAME."""
    service, name = service_of(request), request.query_params.get("model")
    async with service.using(name, find_tenant(request), request.receive) as model:
        return JSON(_tokenizer_info(model.llm))


def _tokenizer_info(llm: LLM) -> dict[str, Any]:
    tokenizer, template = llm.tokenizer, llm.model.template
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    texts = {name: None if id is None else tokenizer.token_text(id) for name, id in ends.items()}
    return texts | {
        "add_bos_token": tokenizer.add_bos,
        "model_max_length": llm.model.context,
        "chat_template": None if template is None else template.template,
    }


async def apply_template(request: Request) -> Response:
    """The text that the model's chat template makes of a conversation."""
    return await _answer(request, TemplateBody, _apply_template)


def _apply_template(body: TemplateBody, llm: LLM) -> dict[str, Any]:
    variables = template_variables(body.chat_template_kwargs)
    return {"prompt": llm.model.chat_text(body.messages, read_tools({"tools": body.tools}), **variables)}


async def _answer(request: Request, kind: type[B], work: Any) -> Response:
    """What the work makes of a body and the model, off the event loop."""
    service, tenant = service_of(request), find_tenant(request)
    value = await service.read(request)
    async with service.using(named_in(value), tenant, request.receive) as model:

        def answer() -> dict[str, Any]:
            body: Any = checked(kind, value)
            adapters = visible(model.tenant, model.llm.engine.adapters.named)
            model.names.resolve(body.model, adapters, model.tenant)
            return work(body, model.llm)

        return JSON(await service.off_loop(answer))


async def props(request: Request) -> Response:
    """Facts of a model and its run: of ?model=NAME."""
    model = service_of(request).find(request.query_params.get("model"), find_tenant(request))
    return JSON(facts(model))


def facts(model: PooledModel) -> dict[str, Any]:
    """What /props says. Of a model that is not loaded there is nothing but its status."""
    found = {"model": model.name, "status": model.status, "version": __version__}
    return found if model.llm is None else found | _facts(model.llm)


def _facts(llm: LLM) -> dict[str, Any]:
    tokenizer, config = llm.tokenizer, llm.model.config
    ends = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    numerics, template = llm.model.numerics, llm.model.template
    found = {
        "architecture": config.architecture,
        "ctx_size": llm.model.context,
        "vocab_size": config.vocab_size,
        "total_slots": llm.engine_config.max_num_seqs,
        "dtype": numerics.dtype,
        "kv_dtype": numerics.kv_dtype,
        "weights": numerics.weights,
        "kernels": numerics.kernels,
        "draft_model": None if llm.draft is None else llm.draft.path.stem,
        "chat_template": None if template is None else template.template,
    }
    texts = {key: None if id is None else tokenizer.token_text(id) for key, id in ends.items()}
    return found | texts


async def health(request: Request) -> Response:
    """200 while requests are served."""
    service = service_of(request)
    if service.status == "ok":
        return JSON({"status": "ok"})
    return JSON({"status": service.status}, 503, headers={"Retry-After": str(RETRY_SECONDS)})


async def prometheus(request: Request) -> Response:
    """The metrics: all of them for an admin, and where there are no keys; else the tenant's own."""
    service, tenant = service_of(request), find_tenant(request)
    sees_all = tenant is ANONYMOUS or tenant.is_admin
    text = service.metrics.text(None if sees_all else tenant.name)
    return Response(text, headers={"Content-Type": metrics.CONTENT_TYPE})


async def version(request: Request) -> Response:
    """This program's version."""
    del request
    return JSON({"version": __version__})


async def openapi(request: Request) -> Response:
    """What this server takes, for programs."""
    from realm_jax.serving.server.openapi import document

    return JSON(document(service_of(request).limits))
