"""A request's bytes to a JSON object, within bounds."""

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from realm_jax.errors import RequestError
from realm_jax.serving.server.errors import ApiError
from realm_jax.serving.server.limits import Limits


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body. Raises ApiError for one that is too large, too slow, or not said to be JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which no web page of another origin can send unasked
        raise ApiError(415, f"content-type is {kind[:60]!r}; it must be application/json")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limits.body_bytes:
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.body_bytes:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        late = f"the body did not come within {limits.body_seconds:g} s"
        raise ApiError(408, late, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left") from None
    return b"".join(parts)


def parsed(raw: bytes, limits: Limits) -> Any:
    """The JSON value of a body. Raises ApiError for what is none, RequestError for one that is too deep."""
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except RecursionError:
        raise RequestError(f"the body is nested deeper than {limits.depth} levels") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    limits.check_depth(value)
    return value


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _too_large(limits: Limits) -> ApiError:
    message = f"the body is larger than {limits.body_bytes:,} bytes, the limit"
    return ApiError(413, message, headers={"Connection": "close"})
