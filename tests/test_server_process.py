"""`realm serve` as a process: loads while it listens, answers, drains, and says what it was told wrongly."""

import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command_line import realm
from openai import OpenAI
from running_server import PATIENCE, metric, post, raw_post, read_events, running, wait_for
from served_process import Served

from realm_jax import LLM, SamplingParams
from realm_jax.serving.bodies import CHAT, COMPLETIONS
from realm_jax.serving.server import process
from realm_jax.serving.server.limits import Limits

pytestmark = pytest.mark.unoptimized

HALF_A_BODY = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HALF_A_BODY += b"Content-Length: 9\r\n\r\n{"
SYSTEM = {"role": "system", "content": "You answer in one short sentence."}
QUESTION = {"role": "user", "content": "What is the capital of France?"}


@pytest.fixture
def served(default_model: Path) -> Iterator[Served]:
    served = Served("-m", default_model, "--ctx-size", 256, "--max-num-seqs", 2)
    yield served
    served.close()


@pytest.mark.slow
def test_the_default_model_is_served_from_loading_to_draining(served: Served) -> None:
    address = str(served.event("listening")["address"])
    early = httpx.get(f"{address}/health", timeout=PATIENCE)
    if early.status_code != 200:  # else it has loaded already
        assert early.status_code == 503 and early.json() == {"status": "loading"}
    assert served.process.stdout is not None
    assert served.process.stdout.readline() == f"{address}\n"
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}

    with OpenAI(base_url=f"{address}/v1", api_key="none", timeout=PATIENCE) as client:
        model = client.models.list().data[0].id
        asked = {"model": model, "messages": [SYSTEM, QUESTION], "temperature": 0, "max_tokens": 40}
        whole = client.chat.completions.create(**asked).choices[0].message.content
        pieces = [
            c.choices[0].delta.content or "" for c in client.chat.completions.create(**asked, stream=True)
        ]
    assert whole is not None and "Paris" in whole
    assert "".join(pieces) == whole and len(pieces) > 3

    running = raw_post(address, CHAT, {**asked, "stream": True, "max_tokens": 100, "ignore_eos": True})
    wait_for(lambda: metric(address, "num_requests_running") == 1)
    served.process.send_signal(signal.SIGTERM)
    served.event("draining")
    late = post(address, CHAT, asked)
    assert late.status_code == 503 and late.headers["retry-after"]
    *_, last = read_events(running)
    running.close()
    assert last["choices"][0]["finish_reason"] == "length", "a running request was cut off"
    assert served.end() == 0
    assert "France" not in json.dumps(served.events)
    request = next(e for e in served.events if e["event"] == "request" and e["path"] == CHAT)
    assert request["status"] == 200 and request["completion_tokens"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], ["0.0.0.0", "--insecure"]),
        (["--host", "nowhere.invalid"], ["nowhere.invalid"]),
        (["-m", "/nowhere.gguf"], ["/nowhere.gguf"]),
        (["--port", "99999"], ["99999"]),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments: list[str], words: list[str]) -> None:
    done = realm("serve", "--port", "0", *arguments)
    assert done.code in (1, 2)
    assert all(word in done.error for word in words)


def test_a_port_in_use_is_one_line() -> None:
    taken = process.listen("127.0.0.1", 0, insecure=False)
    port = taken.getsockname()[1]
    done = realm("serve", "--port", port)
    taken.close()
    assert done.code == 2 and str(port) in done.error


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    llm = LLM(tiny_model, max_num_seqs=2, ctx_size=2048)
    llm.generate("a", SamplingParams(max_tokens=2))
    return llm


def test_who_does_not_send_or_take_is_cut_off(llm: LLM) -> None:
    """Half a head, half a body, and an answer that nobody reads."""
    with running(llm, limits=Limits(idle_seconds=1, body_seconds=0.5, write_seconds=0.5)) as server:
        server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 13)  # connections inherit it
        place = server.listener.getsockname()
        for said, answer in ((b"", b""), (b"GET / HT", b""), (HALF_A_BODY, b"HTTP/1.1 408")):
            with socket.create_connection(place, PATIENCE) as connection:
                connection.sendall(said)
                assert connection.recv(12) == answer
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True, "logprobs": 20}
        stalled = raw_post(server.address, COMPLETIONS, body, receive_buffer=1 << 12)
        wait_for(lambda: server.service.active == 1)
        wait_for(lambda: server.service.active == 0)
        stalled.close()
        wait_for(lambda: metric(server.address, "num_requests_running") == 0)


def test_what_outlasts_the_drain_ends_with_what_it_has(llm: LLM) -> None:
    with running(llm, drain_seconds=0.0) as server:
        body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True, "n": 2}
        stream = raw_post(server.address, COMPLETIONS, body)
        wait_for(lambda: metric(server.address, "num_requests_running") == 2)
        server.drain()
        ends = [event["choices"][0]["finish_reason"] for event in read_events(stream)]
        stream.close()
        assert [end for end in ends if end is not None] == ["abort", "abort"]
    assert not llm.engine.has_work
