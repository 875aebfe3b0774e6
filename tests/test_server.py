"""The server says what `LLM.generate` says, to any number of clients, in OpenAI's form."""

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from bad_bodies import BAD
from openai import OpenAI
from running_server import PATIENCE, body_of, metric, post, raw_post, read_events, running, split, wait_for

from realm_jax import LLM, SamplingParams
from realm_jax.llm import GenerationOutput
from realm_jax.model import hidden_states
from realm_jax.serving.bodies import COMPLETIONS, known_fields
from realm_jax.serving.server.jobs import KINDS, TRANSPORT
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.process import RealmServer

pytestmark = pytest.mark.unoptimized
rng = random.Random(0)
LONG = {"max_tokens": 1900, "ignore_eos": True, "temperature": 1}
LIMITS = Limits(body_bytes=1 << 20, prompts=8, n=4, ping_seconds=0.05)


def some_cases(count: int) -> list[tuple[str, SamplingParams]]:
    """Prompts and parameters of every kind, as SamplingParams has them."""
    cases = []
    for i in range(count):
        params: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "temperature": rng.choice([0, 0.7, 1.3])}
        params["seed"] = rng.randrange(1 << 40)
        params |= [
            {},
            {"top_k": 5, "min_p": 0.02},
            {"top_p": 0.8, "repetition_penalty": 1.3, "stop": ["a", "word2"]},
            {"logprobs": 3, "presence_penalty": 0.5, "frequency_penalty": 0.5},
            {"logit_bias": {270: 5.0, 271: -100.0}, "min_tokens": 5, "stop_token_ids": [270]},
            {"n": 2, "ignore_eos": True, "logprobs": 0},
        ][i % 6]
        text = " ".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 150)))
        cases.append((text, SamplingParams(**params)))
    return cases


CASES = some_cases(24)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, max_num_seqs=4, ctx_size=2048, max_queue=64, max_num_batched_tokens=128)


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[list[GenerationOutput]]:
    """What `LLM.generate` says to each case, before anyone serves."""
    outputs = iter(llm.generate([text for text, _ in CASES], [params for _, params in CASES]))
    return [[next(outputs) for _ in range(params.n)] for _, params in CASES]


@pytest.fixture(scope="module")
def server(llm: LLM, expected: object) -> Iterator[RealmServer]:
    with running(llm, limits=LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RealmServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def streamed(client: OpenAI, prompt: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The choices of a stream, each put together from its pieces."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in client.completions.create(model="tiny", prompt=prompt, stream=True, **split(body)):
        (piece,) = chunk.choices
        whole = choices.setdefault(piece.index, {"text": "", "logprobs": None, "finish_reason": None})
        whole["text"] += piece.text
        assert whole["finish_reason"] is None, "a piece after the last"
        whole["finish_reason"] = piece.finish_reason
        if piece.logprobs is not None:
            lists = piece.logprobs.model_dump()
            known = whole["logprobs"] or {name: [] for name in lists}
            whole["logprobs"] = {name: known[name] + lists[name] for name in lists}
    return [choices[index] for index in sorted(choices)]


def test_served_is_generated_whole_or_streamed_with_others_beside(
    llm: LLM, client: OpenAI, expected: list[list[GenerationOutput]]
) -> None:
    def ask(i: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        text, params = CASES[i]
        whole = client.completions.create(model="tiny", prompt=text, **split(body_of(params)))
        assert whole.usage is not None
        assert whole.usage.completion_tokens == sum(len(output.token_ids) for output in expected[i])
        dumped = [choice.model_dump(exclude={"index"}) for choice in whole.choices]
        return dumped, streamed(client, text, body_of(params))

    order = rng.sample(range(len(CASES)), len(CASES))
    with ThreadPoolExecutor(12) as pool:
        found = dict(zip(order, pool.map(ask, order), strict=True))
    for i, outputs in enumerate(expected):
        whole, pieces = found[i]
        assert whole == pieces
        assert [choice["text"] for choice in whole] == [output.text for output in outputs]
        assert [choice["finish_reason"] for choice in whole] == [str(o.finish_reason) for o in outputs]
        for choice, output in zip(whole, outputs, strict=True):
            if output.logprobs is None:
                assert choice["logprobs"] is None
            else:
                values = choice["logprobs"]["token_logprobs"]
                assert values == [each["logprob"] for each in output.logprobs]


def test_chat_is_chat_with_logprobs_usage_and_bytes(llm: LLM, client: OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "b"}, {"role": "user", "content": "hi"}]
    asked: dict[str, Any] = {"model": "alias", "messages": messages, "max_completion_tokens": 9, "seed": 5}
    asked |= {"logprobs": True, "top_logprobs": 2, "n": 2}
    whole = client.chat.completions.create(**asked)
    params = SamplingParams(max_tokens=9, seed=5, logprobs=2, n=2)
    again = post(str(client.base_url)[:-3], "tokenize", {"messages": messages}).json()["tokens"]
    assert again == llm.chat_prompt(messages)
    assert whole.model == "alias" and whole.usage is not None
    assert whole.usage.prompt_tokens == len(again)
    contents, entries = ["", ""], [[], []]
    stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert last.usage is not None and last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].usage is None
    for chunk in chunks:
        (piece,) = chunk.choices
        contents[piece.index] += piece.delta.content or ""
        if piece.logprobs is not None:
            entries[piece.index] += piece.logprobs.content or []
    for choice in whole.choices:
        assert choice.message.content == contents[choice.index]
        assert choice.logprobs is not None and choice.logprobs.content == entries[choice.index]
        raw = b"".join(bytes(each.bytes or ()) for each in entries[choice.index])
        assert raw.decode("utf-8", "replace") == contents[choice.index]
    assert params.n == len(whole.choices)


def test_prompts_of_every_form_and_echo(server: RealmServer, llm: LLM, client: OpenAI) -> None:
    ids = llm.prompt_ids("a b c")
    forms: list[Any] = ["a b c", ids, ["a b c", "a b c"], [ids, ids]]
    for form in forms:
        many = isinstance(form[0], list) or form[0] == "a b c"
        answer = client.completions.create(model="tiny", prompt=form, max_tokens=3, temperature=0, n=2)
        texts = [choice.text for choice in answer.choices]
        assert len(texts) == (4 if many else 2) and len(set(texts)) == 1
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert answer.usage is not None and answer.usage.prompt_tokens == len(ids) * (2 if many else 1)
    plain = client.completions.create(model="tiny", prompt="a b c", max_tokens=3, temperature=0)
    echo = client.completions.create(
        model="tiny", prompt="a b c", max_tokens=3, temperature=0, echo=True, logprobs=1
    )
    assert echo.choices[0].text == "a b c" + plain.choices[0].text
    logprobs = echo.choices[0].logprobs
    asked = SamplingParams(max_tokens=3, temperature=0, prompt_logprobs=1, logprobs=1)
    (score,) = asyncio.run(server.engine.call("tiny", lambda llm: llm.generate([ids], asked)))
    assert logprobs is not None and logprobs.token_logprobs is not None
    known = [None if each is None else each["logprob"] for each in score.prompt_logprobs or ()]
    assert logprobs.token_logprobs == known + [each["logprob"] for each in score.logprobs or ()]
    pieces = client.completions.create(
        model="tiny", prompt="a b c", max_tokens=3, temperature=0, echo=True, stream=True
    )
    assert "".join(piece.choices[0].text for piece in pieces) == echo.choices[0].text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(server: RealmServer, stream: bool) -> None:
    aborted = metric(server.address, "request_success_total", 'finished_reason="abort"')
    body = {"prompt": "a", "n": 4, "stream": stream, **LONG}
    connection = raw_post(server.address, COMPLETIONS, body)
    wait_for(lambda: metric(server.address, "num_requests_running") == 4)
    connection.close()
    wait_for(lambda: metric(server.address, "num_requests_running") == 0)
    after = metric(server.address, "request_success_total", 'finished_reason="abort"')
    assert after == aborted + 4
    assert server.service.active == 0


def test_a_slow_reader_holds_back_only_itself(server: RealmServer, client: OpenAI) -> None:
    """Its request ends although nobody reads; what it missed comes in fewer, larger pieces, and whole."""
    name = "request_success_total", 'finished_reason="length"'
    ended, tokens = metric(server.address, *name), 500
    body = {"prompt": "a", "n": 4, "stream": True, "logprobs": 20, "seed": 3, **LONG, "max_tokens": tokens}
    buffer = server.listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15)  # connections inherit it
    slow = raw_post(server.address, COMPLETIONS, body, receive_buffer=1 << 15)
    wait_for(lambda: metric(server.address, "num_requests_running") == 4)
    server.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    client.completions.create(model="tiny", prompt="b", max_tokens=2)
    wait_for(lambda: metric(server.address, *name) >= ended + 5)
    assert server.service.active == 1, "it is still being sent"
    events = read_events(slow)
    slow.close()
    texts = ["", "", "", ""]
    for event in events:
        (piece,) = event["choices"]
        texts[piece["index"]] += piece["text"]
    whole = post(server.address, COMPLETIONS, body | {"stream": False, "logprobs": None}).json()
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert len(events) < 2 * tokens


@pytest.mark.parametrize(("path", "body", "status", "param"), BAD)
def test_a_bad_body_is_an_error_that_names_the_field(
    server: RealmServer, path: str, body: Any, status: int, param: str | None
) -> None:
    answer = post(server.address, path, body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) <= 600
    assert post(server.address, COMPLETIONS, {"prompt": "a", "max_tokens": 1}).status_code == 200


def test_what_is_no_request_of_ours_is_refused(server: RealmServer) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    plain = post(server.address, COMPLETIONS, body, headers={"content-type": "text/plain"})
    assert plain.status_code == 415
    rebound = post(server.address, COMPLETIONS, body, headers={"host": "evil.example"})
    assert rebound.status_code == 403
    wrong = httpx.get(f"{server.address}{COMPLETIONS}")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


def test_a_full_queue_is_said_and_harms_nobody(server: RealmServer, client: OpenAI) -> None:
    held = raw_post(server.address, COMPLETIONS, {"prompt": ["a"] * 8, "n": 4, **LONG})
    more = raw_post(server.address, COMPLETIONS, {"prompt": ["a"] * 8, "n": 4, **LONG})
    wait_for(lambda: metric(server.address, "num_requests_waiting") == 60)
    answer = post(server.address, COMPLETIONS, {"prompt": ["b"] * 4, "n": 4})
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
    assert answer.json()["error"]["code"] == "overloaded"
    assert metric(server.address, "num_requests_waiting") == 60, "part of what was refused still waits"
    held.close()
    more.close()
    wait_for(lambda: metric(server.address, "num_requests_waiting") == 0)
    client.completions.create(model="tiny", prompt="b", max_tokens=1)


def test_an_embedding_is_the_mean_of_hidden_states(server: RealmServer, llm: LLM, client: OpenAI) -> None:
    """In any company, and in both forms: OpenAI's client asks for base64 where it is not told."""
    texts = ["a b c " * 40, "d", "e f g"]
    answer = client.embeddings.create(model="tiny", input=texts)
    found = np.array([each.embedding for each in answer.data], np.float32)
    for text, row in zip(texts, found, strict=True):
        ids = llm.prompt_ids(text)
        tokens, positions = jnp.array([ids]), jnp.arange(len(ids))[None]
        caches = llm.transformer.empty_caches(1, 512, llm.model.numerics)
        hidden, _ = hidden_states(llm.transformer, llm.model.params, tokens, positions, caches, None)
        mean = np.asarray(hidden[0], np.float32).mean(axis=0)
        assert np.dot(row, mean / np.linalg.norm(mean)) > 0.999
        alone = post(server.address, "/v1/embeddings", {"input": ids}).json()
        assert np.array_equal(np.array(alone["data"][0]["embedding"], np.float32), row)
        assert alone["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}


def test_a_failed_step_is_an_error_and_the_next_request_runs(
    server: RealmServer, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "a", "max_tokens": 3}
    for stream in (False, True):
        with monkeypatch.context() as broken:
            broken.setattr(llm.engine, "_step", lambda: 1 / 0)
            answer = post(server.address, COMPLETIONS, body | {"stream": stream})
        assert answer.status_code == (200 if stream else 500)
        assert '"code": "internal"' in answer.text or '"code":"internal"' in answer.text
        assert "division" not in answer.text
        assert post(server.address, COMPLETIONS, body).status_code == 200


def test_small_routes(server: RealmServer, client: OpenAI, llm: LLM) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    tokens = post(server.address, "/tokenize", {"prompt": "a b"}).json()["tokens"]
    assert tokens == llm.prompt_ids("a b")
    assert post(server.address, "/detokenize", {"tokens": tokens[1:]}).json() == {"prompt": "a b"}
    made = post(server.address, "/apply-template", {"messages": [{"role": "user", "content": "x"}]}).json()
    assert made == {"prompt": "user: x\nassistant: "}
    facts = httpx.get(f"{server.address}/props").json()
    assert facts["ctx_size"] == 2048 and facts["total_slots"] == 4
    assert httpx.get(f"{server.address}/health").status_code == 200
    assert httpx.get(f"{server.address}/version").json().keys() == {"version"}


def test_request_ids_are_taken_if_sane_and_made_if_not(server: RealmServer) -> None:
    for given, is_kept in (("abc-1", True), ("a b", False), ("x" * 129, False), ("", False)):
        answer = httpx.get(f"{server.address}/version", headers={"X-Request-Id": given})
        assert (answer.headers["x-request-id"] == given) == is_kept
        assert answer.headers["x-request-id"]


def test_the_schemas_know_the_fields_that_bodies_know(server: RealmServer) -> None:
    document = httpx.get(f"{server.address}/openapi.json").json()
    for url, kind in KINDS.items():
        assert set(kind.model_fields) == known_fields(url) | set(TRANSPORT)
        (content,) = document["paths"][url]["post"]["requestBody"]["content"].values()
        name = content["schema"]["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][name]["properties"].keys() == set(kind.model_fields)
    json.dumps(document)


def test_silence_is_filled_with_pings(server: RealmServer) -> None:
    """A stream that waits for a slot says so in comments, which event streams ignore."""
    held = raw_post(server.address, COMPLETIONS, {"prompt": ["a"], "n": 4, **LONG})
    wait_for(lambda: metric(server.address, "num_requests_running") == 4)
    waiting = raw_post(server.address, COMPLETIONS, {"prompt": "b", "max_tokens": 2, "stream": True})
    data = b""
    while b": ping\n\n" not in data:
        part = waiting.recv(4096)
        assert part, data
        data += part
    held.close()
    assert read_events(waiting)
    waiting.close()
