"""Errors as OpenAI's API writes them, and the HTTP status of each of ours."""

import json
import math
from typing import Any

from starlette.responses import Response

from realm_jax.errors import (
    AccessError,
    AuthenticationError,
    CapacityError,
    LimitError,
    ModelFileError,
    RequestError,
    UnsupportedError,
)

MAX_MESSAGE = 600
RETRY_SECONDS = 1


class JSON(Response):
    """A JSON answer. ASCII only: a lone surrogate that a client sent could not be encoded."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


class ApiError(Exception):
    """An answer that is an error. retry: seconds after which the same request may be served."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry: int | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = (headers or {}) | ({} if retry is None else {"Retry-After": str(retry)})

    @property
    def body(self) -> dict[str, Any]:
        message = " ".join(str(self).split())
        message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole answer."""
        return JSON(self.body, self.status, headers=self.headers)


class Unavailable(CapacityError):
    """The server serves nothing now: it loads its first models, or it ends."""


def not_loaded(model: str) -> ApiError:
    """The answer to those who waited for a model that could not be loaded. Why is for the log: its words
    are of the operator's files."""
    message = f"the model {model!r} could not be loaded; the server's log says why"
    return ApiError(500, message, kind="server_error", param="model", code="model_load_failed")


def no_such_model(name: str) -> ApiError:
    """The answer to a name that nothing has."""
    message = f"the model {name[:100]!r} does not exist; GET /v1/models lists those that do"
    return ApiError(404, message, param="model", code="model_not_found")


def api_error(error: Exception, fields: frozenset[str] = frozenset()) -> ApiError:
    """The answer that an error becomes; its message begins with the parameter, if that is one of `fields`."""
    match error:
        case ApiError():
            return error
        case LimitError():
            return ApiError(429, str(error), **_LIMITED, retry=max(math.ceil(error.retry_after), 1))
        case RequestError() | UnsupportedError():
            return _bad_request(error, fields)
    for kind, status, how in _ANSWERS:
        if isinstance(error, kind):
            return ApiError(status, str(error), **how)
    # a bug, or a fault of the server's own files: its words are for the log and not for strangers
    return ApiError(500, "the server failed; its log says why", kind="server_error", code="internal")


def _bad_request(error: Exception, fields: frozenset[str]) -> ApiError:
    first = str(error).partition(" ")[0].split("[")[0].split(".")[0].rstrip(":,")
    code = "context_length_exceeded" if "the context is" in str(error) else None
    code = "unsupported" if isinstance(error, UnsupportedError) else code
    return ApiError(400, str(error), param=first if first in fields else None, code=code)


_LIMITED: dict[str, Any] = {"kind": "rate_limit_error", "code": "rate_limit_exceeded"}
_BUSY: dict[str, Any] = {"kind": "service_unavailable"}
_ANSWERS: tuple[tuple[type[Exception], int, dict[str, Any]], ...] = (
    (Unavailable, 503, _BUSY | {"code": "unavailable", "retry": 5}),
    (CapacityError, 503, _BUSY | {"code": "overloaded", "retry": RETRY_SECONDS}),
    (
        AuthenticationError,
        401,
        {
            "kind": "authentication_error",
            "code": "invalid_api_key",
            "headers": {"WWW-Authenticate": "Bearer"},
        },
    ),
    (AccessError, 403, {"kind": "permission_error", "code": "forbidden"}),
    (ModelFileError, 500, {"kind": "server_error", "code": "model_file"}),
)
"""The first that fits counts."""
