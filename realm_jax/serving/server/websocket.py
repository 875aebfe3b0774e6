"""/ws: any number of calls on one connection.

A client sends objects `{"id", "function", "params"?, "tenant_id"?}` and gets items
`{"id", "status", "data"}`, those of several calls in any mixture. Each call has any number of
"streaming" items and then one of "complete", "error" or "cancelled". Functions:

- authenticate `{"key"}`: the first message of a client that could not send a header
- generate, chat: params as the bodies of /v1/completions and /v1/chat/completions, `stream` true unless
  said otherwise; a streaming item is a choice of a chunk, the complete one the whole answer
- health, metadata: as /health and /props
- cancel `{"id"}`: the call of this id ends

Items are sent one after another, and a client that reads slowly holds back only its own calls.
"""

import asyncio
import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from starlette.websockets import WebSocket, WebSocketDisconnect

from realm_jax.errors import AccessError, RequestError
from realm_jax.serving.bodies import CHAT, COMPLETIONS
from realm_jax.serving.request import GenerationOutput
from realm_jax.serving.server.errors import ApiError, api_error
from realm_jax.serving.server.generation import Pieces, whole_answer
from realm_jax.serving.server.jobs import job_of, named_in
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.logs import event, failed
from realm_jax.serving.server.pages import facts
from realm_jax.serving.server.pooled_model import OpenModel
from realm_jax.serving.server.reading import parsed
from realm_jax.serving.server.schemas import FIELDS
from realm_jax.serving.server.service import service_of
from realm_jax.serving.server.tenancy import key_of
from realm_jax.serving.tenants import Tenant

URLS = {"generate": COMPLETIONS, "chat": CHAT}
FUNCTIONS = (*URLS, "authenticate", "health", "metadata", "cancel")
KNOWN = ("id", "function", "params", "tenant_id")
MAX_ID = 128

Status = Literal["streaming", "complete", "error", "cancelled"]
Id = str | int


@dataclass(frozen=True)
class Call:
    """What a client asks for."""

    id: Id
    function: str
    params: dict[str, Any]
    tenant: str | None


async def websocket(socket: WebSocket) -> None:
    """One connection, to its end."""
    await Connection(socket).run()


class Connection:
    """A client's calls."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket, self._service = socket, service_of(socket)
        self._key = key_of(socket)  # verified with each call: it may be revoked while the connection stays
        self._calls: dict[Id, asyncio.Task[None]] = {}
        self._cancelled: set[Id] = set()  # by the client
        self._sending = asyncio.Lock()
        self._reader: asyncio.Task[Any] | None = None

    async def run(self) -> None:
        """Calls are read and answered until the client leaves or takes nothing for too long."""
        await self._socket.accept()
        self._reader = asyncio.current_task()
        try:
            while (raw := await self._receive()) is not None:
                await self._begin(raw)
        except asyncio.CancelledError:
            if self._reader is None:  # by `_send`: the client takes nothing
                return
            raise
        finally:
            for task in self._calls.values():
                task.cancel()
            await asyncio.gather(*self._calls.values(), return_exceptions=True)

    async def _receive(self) -> bytes | None:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        text, raw = message.get("text"), message.get("bytes")
        return text.encode("utf-8", "surrogatepass") if text is not None else raw or b""

    async def _begin(self, raw: bytes) -> None:
        """The call runs beside the others, or its error is sent."""
        call_id: Id | None = None
        try:
            value = await self._service.off_loop(parsed, raw, self._service.limits)
            call_id = _id_of(value)
            call = read_call(value)
            if call.function == "authenticate":
                await self._authenticate(call)
                return
            tenant = await self._tenant_of(self._key)
            self._check(call, tenant)
        except Exception as error:  # whatever it is, the client has it and the connection goes on
            await self._fail(call_id, error, "")
            return
        if call.function == "cancel":
            await self._cancel(call)
            return
        task = asyncio.ensure_future(self._answer(call, tenant))
        self._calls[call.id] = task
        task.add_done_callback(lambda _: self._forget(call.id))

    def _forget(self, call_id: Id) -> None:
        self._calls.pop(call_id, None)
        self._cancelled.discard(call_id)

    async def _tenant_of(self, key: str | None) -> Tenant:
        return await self._service.off_loop(self._service.tenancy.tenant_of, key)

    def _check(self, call: Call, tenant: Tenant) -> None:
        limits: Limits = self._service.limits
        if call.id in self._calls:
            raise RequestError(f"id {call.id!r} is that of a call that runs; choose another")
        if len(self._calls) >= limits.calls:
            raise ApiError(429, f"{limits.calls} calls run on this connection, the limit", code="overloaded")
        if call.tenant is not None and call.tenant != tenant.name:
            raise AccessError("tenant_id is not that of this connection's key")

    async def _authenticate(self, call: Call) -> None:
        """The connection is that of the key's tenant."""
        key = call.params.get("key")
        if not isinstance(key, str):
            raise RequestError("params must have key, a text")
        tenant = await self._tenant_of(key)
        self._key = key
        await self._send(call.id, "complete", {"tenant_id": tenant.name})

    async def _cancel(self, call: Call) -> None:
        target: Any = call.params.get("id")
        task = self._calls.get(target) if isinstance(target, Id) else None
        if task is not None:
            self._cancelled.add(target)
            task.cancel()
        await self._send(call.id, "complete", {"found": task is not None})

    async def _answer(self, call: Call, tenant: Tenant) -> None:
        start, status = time.perf_counter(), "left"
        counts = call.function in URLS
        self._service.active += counts
        try:
            status = await self._run(call, tenant)
        except WebSocketDisconnect:
            pass
        except asyncio.CancelledError:
            if call.id not in self._cancelled:
                raise
            status = "cancelled"
            await self._send(call.id, "cancelled", {})
        except Exception as error:  # of one call: the others go on
            status = "error"
            await self._fail(call.id, error, call.function)
        finally:
            self._service.active -= counts
            seconds = round(time.perf_counter() - start, 4)
            event("call", function=call.function, status=status, seconds=seconds)

    async def _run(self, call: Call, tenant: Tenant) -> str:
        """The call's items are sent; returns the last one's status."""
        match call.function:
            case "health":
                data: dict[str, Any] = {"status": self._service.status}
            case "metadata":
                data = facts(self._service.find(call.params.get("model"), tenant))
            case _:
                data = await self._generate(call, tenant)
        await self._send(call.id, "complete", data)
        return "complete"

    async def _generate(self, call: Call, tenant: Tenant) -> dict[str, Any]:
        """The whole answer, after its pieces were sent."""
        body = {name: value for name, value in call.params.items() if name != "stream"}
        streams = call.params.get("stream", True)
        if not isinstance(streams, bool):
            raise RequestError(f"stream is {streams!r}; it must be true or false")
        async with self._service.using(named_in(body), tenant) as model:
            return await self._run_job(call, body, model, streams=streams)

    async def _run_job(
        self, call: Call, body: dict[str, Any], model: OpenModel, *, streams: bool
    ) -> dict[str, Any]:
        service, llm = self._service, model.llm
        about = (llm, model.names, service.limits, model.tenant)
        job = await service.off_loop(job_of, URLS[call.function], body, *about)
        ticket = await service.submit(model, job.requests)
        pieces, outputs = Pieces(job, llm), list[GenerationOutput]()
        try:
            while not ticket.is_done:
                for delta in await ticket.take():
                    if delta.output is not None:
                        outputs.append(delta.output)
                    if streams and (choice := pieces.choice(delta)) is not None:
                        await self._send(call.id, "streaming", choice)
        finally:
            ticket.close()
        outputs.sort(key=lambda output: output.sample_index)
        return await service.off_loop(whole_answer, job, outputs, llm)

    async def _fail(self, call_id: Id | None, error: Exception, function: str) -> None:
        answer = api_error(error, FIELDS.get(URLS.get(function, ""), frozenset()))
        if answer.code == "internal":
            failed("a call failed", error)
        await self._send(call_id, "error", answer.body["error"])

    async def _send(self, call_id: Id | None, status: Status, data: dict[str, Any]) -> None:
        """The item is on its way. A client that takes nothing for too long has left."""
        item = json.dumps({"id": call_id, "status": status, "data": data}, separators=(",", ":"))
        with suppress(WebSocketDisconnect):
            async with self._sending:
                try:
                    async with asyncio.timeout(self._service.limits.write_seconds):
                        await self._socket.send_text(item)
                except TimeoutError:
                    self._give_up()

    def _give_up(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.cancel()


def read_call(value: Any) -> Call:
    """The call of a message. Raises RequestError that names the field."""
    if unknown := sorted(set(value) - set(KNOWN)):
        raise RequestError(f"unknown field {unknown[0][:60]!r}; known: {', '.join(KNOWN)}")
    function, params, tenant = value.get("function"), value.get("params", {}), value.get("tenant_id")
    if function not in FUNCTIONS:
        raise RequestError(f"function is {str(function)[:60]!r}; it must be one of {', '.join(FUNCTIONS)}")
    if not isinstance(params, dict):
        raise RequestError("params must be an object")
    if tenant is not None and not isinstance(tenant, str):
        raise RequestError("tenant_id must be a text")
    return Call(_id_of(value), function, params, tenant)


def _id_of(value: Any) -> Id:
    if not isinstance(value, dict):
        raise RequestError(f"a message must be an object with {', '.join(KNOWN)}")
    call_id = value.get("id")
    if isinstance(call_id, bool) or not isinstance(call_id, Id) or len(str(call_id)) > MAX_ID:
        raise RequestError(f"id must be a text or a whole number of at most {MAX_ID} characters")
    return call_id
