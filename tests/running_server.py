"""A server on a thread of this process, over a model that tests hold as well."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx

from realm_jax import LLM, SamplingParams
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.pooled_model import InMemory, PooledModel
from realm_jax.serving.server.process import RealmServer, Settings

PATIENCE = 120.0  # seconds: other processes may have the machine


@contextmanager
def running(
    llm: LLM, *, names: tuple[str, ...] = ("tiny", "alias"), **settings: Any
) -> Iterator[RealmServer]:
    """A server of the model, ready; it has drained when the block ends, unless it did before."""
    with running_models([PooledModel(ModelNames(names), InMemory(llm), preload=True)], **settings) as server:
        yield server


@contextmanager
def running_models(models: Sequence[PooledModel], **settings: Any) -> Iterator[RealmServer]:
    """A server of several."""
    ready = threading.Event()
    asked: dict[str, Any] = {"port": 0} | settings
    server = RealmServer(Settings(**asked), models, lambda _: ready.set())
    thread = threading.Thread(target=server.run_to_end)
    thread.start()
    try:
        assert ready.wait(PATIENCE)
        yield server
    finally:
        server.drain()
        thread.join(PATIENCE)
        assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    """The condition holds. Fails if it does not in time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def post(address: str, path: str, body: object, **options: Any) -> httpx.Response:
    """The answer to a JSON body; bytes are sent as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    return httpx.post(f"{address}{path}", content=content, headers=headers, timeout=PATIENCE, **options)


def metric(address: str, name: str, label: str = "") -> float:
    """The sum of a metric's samples whose line has the label, such as `tenant="ann"`."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith(f"realm:{name}") and label in line
    )


def raw_post(address: str, path: str, body: object, *, receive_buffer: int | None = None) -> socket.socket:
    """A connection whose request was sent and of whose answer nothing was read."""
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(PATIENCE)
    connection.connect((host, int(port)))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.0\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


def read_events(connection: socket.socket) -> list[dict[str, Any]]:
    """The events of a stream, to its end, which must be there."""
    data = b""
    while part := connection.recv(1 << 16):
        data += part
    lines = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def body_of(params: SamplingParams) -> dict[str, Any]:
    """The parameters as a body has them: those that are not the default."""
    given = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    default = SamplingParams()
    body = {name: value for name, value in given.items() if value != getattr(default, name)}
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): value for token, value in body["logit_bias"].items()}
    return body


def split(body: dict[str, Any]) -> dict[str, Any]:
    """The body as arguments of the official client, which knows OpenAI's fields alone."""
    more = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens")
    return {k: v for k, v in body.items() if k not in more} | {
        "extra_body": {k: v for k, v in body.items() if k in more}
    }
