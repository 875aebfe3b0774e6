"""Calls over HTTP and the WebSocket: forced ones always validate, and streamed is whole."""

import asyncio
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from running_server import PATIENCE, post, running
from schemas import conforms, random_schema
from test_websocket import ends, opened, send
from tiny import write_model
from tool_templates import TEMPLATES

from realm_jax import LLM, SamplingParams
from realm_jax.serving.batch import BatchJob
from realm_jax.serving.bodies import CHAT
from realm_jax.serving.server.process import RealmServer
from realm_jax.tools import read_tools

pytestmark = pytest.mark.unoptimized

MARKER = "[TOOL_CALLS]"
MESSAGES: list[Any] = [{"role": "user", "content": "a b"}]
SHAPES: dict[str, Any] = {"ctx_size": 2048, "max_num_seqs": 4, "max_num_batched_tokens": 128}


def tool(name: str, schema: Any = None) -> dict[str, Any]:
    about = {"name": name} if schema is None else {"name": name, "parameters": schema}
    return {"type": "function", "function": about}


def object_schema(rng: random.Random) -> dict[str, Any]:
    while (schema := random_schema(rng))["type"] != "object":
        pass
    return schema


rng = random.Random(5)
SCHEMAS = {f"f{i}": object_schema(rng) for i in range(4)} | {"nothing": None}
TOOLS = [tool(name, schema) for name, schema in SCHEMAS.items()]
EMPTY = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}


@pytest.fixture(scope="module", params=["hermes", "mistral", "llama"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """One model of each kind: a marker that is text, one that is a control token, and none."""
    folder, template = tmp_path_factory.mktemp("tools"), TEMPLATES[request.param]
    path = write_model(folder / "tools.gguf", template=template, control=(MARKER,))
    return LLM(path, **SHAPES)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[RealmServer]:
    with running(llm) as server:
        yield server
    llm.engine.grammars.close()


@pytest.fixture(scope="module")
def client(server: RealmServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def together(stream: Any) -> dict[int, dict[str, Any]]:
    """The messages of a stream, each put together from its pieces."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        (piece,) = chunk.choices
        whole = choices.setdefault(piece.index, {"content": None, "tool_calls": [], "finish_reason": None})
        assert whole["finish_reason"] is None, "a piece after the last"
        whole["finish_reason"] = piece.finish_reason
        if piece.delta.content:
            whole["content"] = (whole["content"] or "") + piece.delta.content
        for call in piece.delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(whole["tool_calls"]) and call.type == "function"
                whole["tool_calls"].append([call.id, call.function.name, ""])
            whole["tool_calls"][call.index][2] += call.function.arguments
    return choices


def shown(choice: Any) -> dict[str, Any]:
    """A whole choice as `together` has it."""
    calls = [[c.id, c.function.name, c.function.arguments] for c in choice.message.tool_calls or ()]
    return {"content": choice.message.content, "tool_calls": calls, "finish_reason": choice.finish_reason}


def same(whole: dict[str, Any], streamed: dict[str, Any]) -> bool:
    """But for the ids, which are those of two requests."""
    bare = [each | {"tool_calls": [call[1:] for call in each["tool_calls"]]} for each in (whole, streamed)]
    return bare[0] == bare[1]


@pytest.mark.parametrize("choice", ["required", "f1", "nothing"])
def test_forced_calls_validate_and_streamed_is_whole(client: OpenAI, llm: LLM, choice: str) -> None:
    is_named = choice != "required"
    for seed in range(2):
        asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "n": 2, "seed": seed}
        asked |= {"tool_choice": tool(choice) if is_named else choice, "temperature": 0.7 + seed}
        asked |= {"max_tokens": 400, "parallel_tool_calls": seed > 0}
        whole = client.chat.completions.create(**asked)
        streamed = together(client.chat.completions.create(**asked, stream=True))
        for each in whole.choices:
            assert same(shown(each), streamed[each.index])
            calls = each.message.tool_calls or []
            assert len(calls) == len({call.id for call in calls})
            if each.finish_reason == "length":  # calls without end: the last may be cut
                assert seed > 0 and not is_named and llm.model.require_tools().format.between
                calls = calls[:-1]
            else:
                assert each.finish_reason == "tool_calls" and each.message.content is None
                assert len(calls) == 1 or (seed > 0 and not is_named)
            for call in calls:
                assert call.type == "function" and (not is_named or call.function.name == choice)
                schema = SCHEMAS[call.function.name] or EMPTY
                assert conforms(json.loads(call.function.arguments), schema)


def test_where_the_model_decides_an_answer_without_calls_is_as_ever(
    server: RealmServer, client: OpenAI, llm: LLM
) -> None:
    """The form that calls would have to have changes nothing else of it."""
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 40}
    strange = [
        i for i in range(259) if llm.tokenizer.is_special(i) or llm.tokenizer.token_bytes(i) >= b"\x80"
    ]
    asked["logit_bias"] = {str(token): -100 for token in strange if token not in llm.tokenizer.eog_ids}
    bias = {int(token): value for token, value in asked["logit_bias"].items()}
    prompt = llm.chat_prompt(MESSAGES, tools=read_tools({"tools": TOOLS}))
    for seed in range(3):
        answer = client.chat.completions.create(**asked, seed=seed).choices[0]
        streamed = together(client.chat.completions.create(**asked, seed=seed, stream=True))[0]
        said = shown(answer)
        assert same(said, streamed | {"content": streamed["content"] or said["content"]})
        params = SamplingParams(seed=seed, max_tokens=40, logit_bias=bias, skip_special_tokens=False)
        (wanted,) = asyncio.run(
            server.engine.call("tiny", partial(LLM.generate, prompts=[prompt], params=params))
        )
        if MARKER not in wanted.text:
            assert answer.message.content == wanted.text and not answer.message.tool_calls
            assert answer.finish_reason == wanted.finish_reason


def test_what_begins_as_a_call_becomes_one(client: OpenAI, llm: LLM) -> None:
    """Nobody forces it, but the marker once said, only a valid call may follow."""
    if llm.model.require_tools().format.name != "mistral":
        pytest.skip("the marker of this model is no single token, which a bias could bring about")
    token = llm.tokenizer.token_to_id(MARKER)
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 700}
    asked |= {"logit_bias": {str(token): 100}, "parallel_tool_calls": False}
    for seed in range(2):
        (choice,) = client.chat.completions.create(**asked, seed=seed).choices
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert len(call.id) == 9, "the family's templates refuse others"
        schema = SCHEMAS[call.function.name] or EMPTY
        assert conforms(json.loads(call.function.arguments), schema)


def test_a_conversation_with_calls_goes_on(server: RealmServer, client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "tools": TOOLS, "temperature": 0}
    forced: dict[str, Any] = {"tool_choice": tool("nothing"), "max_tokens": 200}
    answer = client.chat.completions.create(**asked, **forced)
    message = answer.choices[0].message
    (call,) = message.tool_calls or []
    more: list[Any] = [
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "the result"},
    ]
    text = post(server.address, "/apply-template", {"messages": MESSAGES + more, "tools": TOOLS}).json()
    assert '"name": "nothing"' in text["prompt"] and "tool: the result\n" in text["prompt"]
    count = post(server.address, "/tokenize", {"messages": MESSAGES + more, "tools": TOOLS}).json()["count"]
    asked |= {"messages": MESSAGES + more, "max_tokens": 3, "tool_choice": "none"}
    asked["tools"] = TOOLS[:1]
    then = client.chat.completions.create(**asked)
    assert then.usage is not None and then.usage.prompt_tokens < count, "none: the model hears of no tools"


def test_the_websocket_says_the_same(server: RealmServer) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": tool("f1"), "seed": 3}
    body |= {"max_tokens": 700}
    http = post(server.address, CHAT, body).json()["choices"][0]
    with opened(server) as socket:
        send(socket, 1, "chat", body)
        *pieces, last = ends(socket, 1)[1]
    (choice,) = last["data"]["choices"]
    calls = [call for each in pieces for call in each["data"]["delta"].get("tool_calls", ())]
    assert [call["id"] for call in calls if "id" in call] == [choice["message"]["tool_calls"][0]["id"]]
    arguments = "".join(call["function"]["arguments"] for call in calls)
    for each in (http, choice):
        assert each["finish_reason"] == "tool_calls"
        assert each["message"]["tool_calls"][0]["function"] == {"name": "f1", "arguments": arguments}


def test_batch_lines_take_tools(server: RealmServer, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    line = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": tool("nothing"), "max_tokens": 200}
    bad = line | {"tools": [tool("nothing", {"properties": {"a": {"pattern": "("}}})]}
    source.write_text("\n".join(json.dumps(each) for each in (line, bad)))
    asyncio.run(server.engine.call("tiny", lambda llm: BatchJob(llm, source, target).run()))
    found = {row["custom_id"]: row for row in map(json.loads, target.read_text().splitlines())}
    (choice,) = found["line-1"]["response"]["body"]["choices"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "nothing" and json.loads(call["function"]["arguments"]) == {}
    assert found["line-2"]["error"]["message"].startswith("tools: the grammar cannot be used")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [tool("f", {"properties": {"a": {"$ref": "#/nowhere"}}})]}, "tools"),
        ({"tools": [tool("f", {"properties": {"a": {"type": "string", "pattern": "("}}})]}, "tools"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages"),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}
                ]
            },
            "messages",
        ),
    ],
)
def test_a_bad_request_names_its_field(server: RealmServer, more: dict[str, Any], words: str) -> None:
    body = {"messages": MESSAGES, "tool_choice": "required" if "tools" in more else None, **more}
    answer = post(server.address, CHAT, body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == words, answer.text
