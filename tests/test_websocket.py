"""A call on the WebSocket says what the same body says over HTTP, whatever else runs on the connection."""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running_server import PATIENCE, metric, post, running, wait_for
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from realm_jax import LLM
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.process import RealmServer

pytestmark = pytest.mark.unoptimized

LIMITS = Limits(body_bytes=1 << 18, calls=8, write_seconds=2.0)
LONG = {"prompt": "a b", "max_tokens": 900, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[RealmServer]:
    llm = LLM(tiny_model, max_num_seqs=4, ctx_size=1024, deterministic=True)
    with running(llm, limits=LIMITS) as server:
        yield server


@pytest.fixture
def socket(server: RealmServer) -> Iterator[ClientConnection]:
    with opened(server) as socket:
        yield socket


def opened(server: RealmServer, **options: Any) -> ClientConnection:
    address = server.address.replace("http://", "ws://")
    return connect(f"{address}/ws", open_timeout=PATIENCE, close_timeout=PATIENCE, **options)


def send(socket: ClientConnection, call_id: Any, function: Any, params: Any = None, **more: Any) -> None:
    call = {"id": call_id, "function": function} | ({} if params is None else {"params": params})
    socket.send(json.dumps(call | more))


def receive(socket: ClientConnection) -> dict[str, Any]:
    return json.loads(socket.recv(timeout=PATIENCE))


def ends(socket: ClientConnection, count: int) -> dict[Any, list[dict[str, Any]]]:
    """The items of each call, once so many calls have ended."""
    items: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    while count:
        item = receive(socket)
        assert set(item) == {"id", "status", "data"}
        assert not items[item["id"]] or items[item["id"]][-1]["status"] == "streaming", "it had ended"
        items[item["id"]].append(item)
        count -= item["status"] != "streaming"
    return items


def test_calls_at_once_say_what_http_says(server: RealmServer, socket: ClientConnection):
    bodies: dict[int, tuple[str, str, dict[str, Any]]] = {
        i: (
            "generate",
            "/v1/completions",
            {"prompt": "b " * (i + 1), "max_tokens": 5 + i, "seed": i, "n": 1 + i % 2},
        )
        for i in range(6)
    }
    message = {"role": "user", "content": "c d"}
    bodies[6] = ("chat", "/v1/chat/completions", {"messages": [message], "max_tokens": 9, "seed": 4})
    for i, (function, _, body) in bodies.items():
        send(socket, i, function, body)
    items = ends(socket, len(bodies))
    for i, (function, url, body) in bodies.items():
        wanted = post(server.address, url, body).json()
        *pieces, last = items[i]
        assert last["status"] == "complete", last
        assert last["data"]["choices"] == wanted["choices"]
        assert last["data"]["usage"]["completion_tokens"] == wanted["usage"]["completion_tokens"]
        for choice in wanted["choices"]:
            mine = [each["data"] for each in pieces if each["data"]["index"] == choice["index"]]
            if function == "chat":
                said = "".join(each["delta"].get("content") or "" for each in mine)
                assert said == choice["message"]["content"]
            else:
                assert "".join(each["text"] for each in mine) == choice["text"]
            assert [each["finish_reason"] for each in mine if each["finish_reason"]] == [
                choice["finish_reason"]
            ]


def test_a_whole_answer_alone(socket: ClientConnection):
    send(socket, "a", "generate", {"prompt": "x", "max_tokens": 8, "stream": False})
    assert [item["status"] for item in ends(socket, 1)["a"]] == ["complete"]


def test_cancel_ends_that_call_alone(server: RealmServer, socket: ClientConnection):
    send(socket, 1, "generate", LONG)
    send(socket, 2, "generate", LONG | {"max_tokens": 40})
    assert receive(socket)["status"] == "streaming"
    send(socket, 3, "cancel", {"id": 1})
    send(socket, 4, "cancel", {"id": "nobody"})
    items = ends(socket, 4)
    assert {i: each[-1]["status"] for i, each in items.items()} == {
        1: "cancelled",
        2: "complete",
        3: "complete",
        4: "complete",
    }
    assert (items[3][-1]["data"], items[4][-1]["data"]) == ({"found": True}, {"found": False})
    assert items[2][-1]["data"]["usage"]["completion_tokens"] == 40
    wait_for(lambda: metric(server.address, "num_requests_running") == 0)
    send(socket, 1, "health")  # its id is free again
    assert ends(socket, 1)[1][-1]["data"] == {"status": "ok"}


def test_facts(socket: ClientConnection):
    send(socket, "m", "metadata", tenant_id="anonymous")
    assert ends(socket, 1)["m"][-1]["data"]["ctx_size"] == 1024


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("{", "no JSON"),
        ("[]", "a message must be an object"),
        ('{"function": "health"}', "id must be a text or a whole number"),
        ('{"id": true, "function": "health"}', "id must be"),
        ('{"id": 1, "function": "eval"}', "function is 'eval'; it must be one of generate, chat,"),
        ('{"id": 1, "function": "health", "parms": {}}', "unknown field 'parms'"),
        ('{"id": 1, "function": "generate", "params": []}', "params must be an object"),
        ('{"id": 1, "function": "generate", "params": {"prompt": "a", "heat": 1}}', "heat"),
        ('{"id": 1, "function": "generate", "params": {"prompt": "a", "temperature": -1}}', "temperature"),
        ('{"id": 1, "function": "generate", "params": {"prompt": "a", "stream": 1}}', "stream"),
        ('{"id": 1, "function": "health", "tenant_id": "else"}', "tenant_id is not"),
    ],
)
def test_a_bad_message_is_an_error_and_the_connection_goes_on(
    socket: ClientConnection, message: str, named: str
):
    socket.send(message)
    item = receive(socket)
    assert item["status"] == "error"
    assert named in item["data"]["message"]
    send(socket, "next", "health")
    assert receive(socket)["data"] == {"status": "ok"}


def test_an_id_that_is_in_use_and_too_many_calls(server: RealmServer, socket: ClientConnection):
    for i in range(LIMITS.calls):
        send(socket, i, "generate", LONG)
    send(socket, 0, "health")
    send(socket, "one more", "health")
    said: dict[Any, str] = {}
    while len(said) < 2:
        item = receive(socket)
        if item["status"] == "error":
            said[item["id"]] = item["data"]["message"]
    assert "call that runs" in said[0]
    assert f"{LIMITS.calls} calls run on this connection" in said["one more"]
    socket.close()
    wait_for(lambda: metric(server.address, "num_requests_running") == 0)


def test_a_client_that_reads_nothing_is_given_up_and_harms_nobody(server: RealmServer):
    with opened(server, max_queue=1) as idle:  # nothing but one message is taken off the connection
        logprobs = {"logprobs": 20, "n": 4}  # much to send
        send(idle, 1, "generate", LONG | logprobs)
        with opened(server) as other:
            send(other, 1, "generate", {"prompt": "a", "max_tokens": 20, "ignore_eos": True})
            assert ends(other, 1)[1][-1]["status"] == "complete"
        wait_for(lambda: metric(server.address, "num_requests_running") == 0)
        with pytest.raises(ConnectionClosed):
            while True:
                idle.recv(timeout=PATIENCE)


@pytest.mark.parametrize(
    ("headers", "is_let_in"),
    [({"Origin": "https://evil.example"}, False), ({"Origin": "null"}, False), ({}, True)],
)
def test_a_page_of_another_site_may_not_connect(
    server: RealmServer, headers: dict[str, str], is_let_in: bool
):
    if is_let_in:
        with opened(server, additional_headers={"Origin": server.address}) as socket:
            send(socket, 1, "health")
            assert receive(socket)["status"] == "complete"
        return
    with pytest.raises(InvalidStatus, match="403"), opened(server, additional_headers=headers):
        pass


def test_a_message_that_is_too_large_ends_the_connection(server: RealmServer, socket: ClientConnection):
    with pytest.raises(ConnectionClosed, match="1009"):
        socket.send("x" * (LIMITS.body_bytes + 1))
        socket.recv(timeout=PATIENCE)
    assert metric(server.address, "num_requests_running") == 0
