"""What every request passes: its id, whether it may come in at all, its errors, and its line in the log."""

import re
import secrets
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from realm_jax.serving.server.connection import LEFT, ClientLeft
from realm_jax.serving.server.errors import ApiError, Unavailable, api_error
from realm_jax.serving.server.logs import event, failed
from realm_jax.serving.server.schemas import FIELDS
from realm_jax.serving.server.service import Service
from realm_jax.serving.server.tenancy import key_of
from realm_jax.serving.tenants import Tenant

SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
QUIET = ("/health", "/metrics")
"""Asked so often that a log of them would hide the rest, and answered to the end."""


OPEN = ("/health", "/", "/page.css", "/page.js")
"""For which nobody needs a key: the page has nothing that is anyone's, and asks for one."""


class Gate:
    """The application behind the server's rules."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self.service = service  # where `service_of` finds it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self
        if scope["type"] == "websocket":
            await self._let_in(scope, receive, send)
            return
        visit = _Visit(scope, send)
        counts = scope["path"] not in QUIET
        self.service.active += counts
        try:
            self._check_host(visit.headers)
            if self.service.is_draining and counts:
                raise Unavailable("the server is shutting down; try another one")
            if scope["path"] not in OPEN:
                scope["realm.tenant"] = await self._tenant(scope)
            await self._app(scope, receive, visit.send)
        except ClientLeft:
            visit.status = LEFT
        except Exception as error:  # no fault of one request may end the server
            await self._fail(visit, scope, receive, error)
        finally:
            self.service.active -= counts
            if counts:
                event("request", **visit.line())

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A WebSocket, unless it may not come in: its handshake is answered with the error then."""
        visit = _Visit(scope, send)
        try:
            self._check_host(visit.headers)
            _check_origin(visit.headers)
            if self.service.is_draining:
                raise Unavailable("the server is shutting down; try another one")
            if key_of(HTTPConnection(scope)) is not None:  # otherwise it is told by the first message
                await self._tenant(scope)
            await self._app(scope, receive, send)
        except Exception as error:  # no fault of one connection may end the server
            answer = visit.no_route(error) if isinstance(error, HTTPException) else api_error(error)
            if answer.code == "internal":
                failed("a connection failed", error, request_id=visit.id)
            await WebSocketClose(reason=str(answer)[:100])(scope, receive, send)

    async def _tenant(self, scope: Scope) -> Tenant:
        return await self.service.off_loop(self.service.tenancy.tenant_of, key_of(HTTPConnection(scope)))

    def _check_host(self, headers: Headers) -> None:
        hosts = self.service.hosts
        host = re.sub(r":\d+$", "", headers.get("host", "")).lower()
        if hosts is not None and host not in hosts:
            message = (
                f"host is {host[:100]!r}; this server answers to {', '.join(sorted(hosts))} (--insecure)"
            )
            raise ApiError(403, message, code="host_refused")

    async def _fail(self, visit: "_Visit", scope: Scope, receive: Receive, error: Exception) -> None:
        """The client has the error, if its answer has not begun."""
        fields = FIELDS.get(scope["path"], frozenset())
        answer = visit.no_route(error) if isinstance(error, HTTPException) else api_error(error, fields)
        visit.error = answer
        if answer.code == "internal":
            failed("a request failed", error, request_id=visit.id)
        if visit.status is None:
            await answer.response()(scope, receive, visit.send)


def _check_origin(headers: Headers) -> None:
    """A page of another site, which a browser lets connect to anything, is refused."""
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        raise ApiError(403, f"origin is {origin[:100]!r}, another site", code="origin_refused")


class _Visit:
    """One request on its way through."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send, self._start = scope, send, time.perf_counter()
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.id = given if SANE_ID.fullmatch(given) else secrets.token_hex(16)
        self.status: int | None = None
        self.error: ApiError | None = None

    async def send(self, message: Message) -> None:
        """Sends on, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)

    def no_route(self, error: HTTPException) -> ApiError:
        """There is no such path, or not with this method."""
        what = f"{self._scope.get('method', 'WebSocket')} {self._scope['path'][:100]}"
        message = f"there is no {what}; GET /openapi.json lists what there is"
        return ApiError(error.status_code, message, code="not_found", headers=dict(error.headers or {}))

    def line(self) -> dict[str, object]:
        """What the log says of it: no text of prompts and answers, but what the handlers noted."""
        fields: dict[str, object] = {
            "request_id": self.id,
            "method": self._scope["method"],
            "path": self._scope["path"][:200],
            "status": self.status,
            "seconds": round(time.perf_counter() - self._start, 4),
        }
        if self.error is not None:
            # not its message, which may quote what was sent
            fields |= {"error": self.error.code or self.error.kind, "param": self.error.param}
        return fields | self._scope.get("realm.log", {})
