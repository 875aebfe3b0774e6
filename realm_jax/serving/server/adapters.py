"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM names them: adapters while requests run."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

from realm_jax.errors import AccessError, RequestError
from realm_jax.lora import read
from realm_jax.serving.server.errors import JSON, ApiError
from realm_jax.serving.server.schemas import LoadAdapterBody, UnloadAdapterBody, checked
from realm_jax.serving.server.service import Service, note, service_of
from realm_jax.serving.server.tenancy import find_tenant
from realm_jax.serving.tenants import ANONYMOUS

MAX_NAME = 256


async def load_adapter(request: Request) -> Response:
    """Requests may name the adapter, a file or folder of the operator's folder of adapters."""
    service = _opened(request)
    body = checked(LoadAdapterBody, await service.read(request))
    name = body.lora_name
    if not name or len(name) > MAX_NAME or not name.isprintable() or any(c.isspace() for c in name):
        raise RequestError(f"lora_name must have 1 to {MAX_NAME} printable characters and no spaces")
    service.check_serving()
    only, *others = service.pool.models
    if body.model is None and others:
        raise RequestError("model is missing: several are served; say whose adapter it is")
    target = only if body.model is None else service.find(body.model, find_tenant(request))
    for model in service.pool.models:
        if name in model.names.names or (name in model.adapter_names and model is not target):
            raise RequestError(f"lora_name is {name!r}, which is that of another model; choose another")
    path = await service.off_loop(_path, service.adapter_folder, body.lora_path)
    async with service.pool.using(target) as llm:
        adapter = await service.off_loop(read, path, llm.model.base)
        await service.engine.call(target.name, lambda llm: llm.engine.load_adapter(name, adapter))
        target.adapters[name] = path
    note(request, adapter=name)
    return JSON({"id": name, "object": "model", "parent": target.name})


async def unload_adapter(request: Request) -> Response:
    """The adapter is gone, unless a request uses it."""
    service = _opened(request)
    body = checked(UnloadAdapterBody, await service.read(request))
    name = body.lora_name
    service.check_serving()
    owner = next((model for model in service.pool.models if name in model.adapter_names), None)
    if owner is None:
        raise ApiError(404, f"the adapter {name[:100]!r} is not loaded", param="lora_name", code="not_found")
    if owner.llm is not None:
        async with service.pool.using(owner):
            await service.engine.call(owner.name, lambda llm: llm.unload_adapter(name))
    owner.adapters.pop(name, None)
    note(request, adapter=name)
    return JSON({"id": name, "object": "model", "deleted": True})


def _opened(request: Request) -> Service:
    """The service, for one who may change what all share."""
    service, tenant = service_of(request), find_tenant(request)
    if service.adapter_folder is None:
        raise AccessError("adapters cannot be loaded here; the operator may name a folder: --lora-dir DIR")
    if tenant is not ANONYMOUS and not tenant.is_admin:
        raise AccessError("this takes the key of a tenant with is_admin = true")
    return service


def _path(folder: Path | None, given: str) -> Path:
    """The file within the folder, links followed. Raises RequestError for one that is not, without a word
    of what lies elsewhere."""
    assert folder is not None
    wrong = RequestError("lora_path names nothing in the folder of adapters; give a path within it")
    try:
        path = (folder.resolve() / given).resolve()
        is_there = path.is_relative_to(folder.resolve()) and path.exists()
    except (OSError, ValueError):
        raise wrong from None
    if not is_there or path == folder.resolve():
        raise wrong
    return path
