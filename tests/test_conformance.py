"""OpenAI's own clients, in Python and in Node, against the default model: every endpoint and option."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from running_server import PATIENCE, post, running
from test_websocket import ends, opened, send

from realm_jax import LLM
from realm_jax.serving.server.process import RealmServer

MODEL = "smollm2-135m-instruct"
HERE = Path(__file__).parent
MESSAGES: list[Any] = [
    {"role": "system", "content": "You answer in one short sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
CHAT: dict[str, Any] = GREEDY | {"messages": MESSAGES, "max_completion_tokens": 16}
FRANCE: dict[str, Any] = GREEDY | {"prompt": "The capital of France is", "max_tokens": 4}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def given(**options: Any) -> dict[str, Any]:
    """Options, as the client's overloads take them."""
    return options


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    return LLM(default_model, ctx_size=512, max_num_seqs=4, deterministic=True)


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[RealmServer]:
    with running(llm, names=(MODEL,)) as server:
        yield server
    llm.engine.grammars.close()


@pytest.fixture(scope="module")
def client(server: RealmServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def test_paris_over_http_events_and_the_websocket(server: RealmServer, client: OpenAI):
    whole = client.chat.completions.create(**CHAT)
    text = whole.choices[0].message.content
    assert text is not None and "Paris" in text
    stream = client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert last.usage is not None and whole.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )
    with opened(server) as socket:
        send(socket, 1, "chat", {name: value for name, value in CHAT.items() if name != "model"})
        *pieces, item = ends(socket, 1)[1]
    assert item["data"]["choices"][0]["message"]["content"] == text
    assert "".join(piece["data"]["delta"].get("content") or "" for piece in pieces) == text


def test_completions(client: OpenAI, llm: LLM):
    said = client.completions.create(**FRANCE).choices[0].text
    ids = llm.tokenizer.encode(FRANCE["prompt"])
    many = client.completions.create(**FRANCE | given(prompt=[FRANCE["prompt"], "Two and two make"], n=2))
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in many.choices[:2]] == [said, said] != many.choices[2].text
    prompts: dict[str, Any] = {"prompt": [ids, ids]}
    of_ids = client.completions.create(**FRANCE | prompts)
    assert [choice.text for choice in of_ids.choices] == [said, said]
    echo = client.completions.create(**FRANCE, echo=True, logprobs=2).choices[0]
    assert echo.text == FRANCE["prompt"] + said and echo.logprobs is not None
    lists = echo.logprobs
    assert lists.tokens is not None and "".join(lists.tokens) == echo.text
    assert lists.token_logprobs is not None and len(lists.token_logprobs) == len(ids) + 4
    assert lists.top_logprobs is not None and all(len(top) >= 2 for top in lists.top_logprobs[1:])
    assert lists.text_offset is not None
    assert [
        echo.text[at:][: len(t)] for at, t in zip(lists.text_offset, lists.tokens, strict=True)
    ] == lists.tokens
    pieces = client.completions.create(**FRANCE, echo=True, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == echo.text


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "."}, "suffix"),
        ({"suffix": ".", "stream": True}, "suffix"),
        ({"echo": True, "logprobs": 1, "stream": True}, "stream"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_what_completions_refuse(client: OpenAI, more: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(**FRANCE | more)
    assert error.value.param == param


def test_chat_options(client: OpenAI, llm: LLM):
    scored = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0]
    assert scored.logprobs is not None and scored.logprobs.content is not None
    assert all(len(each.top_logprobs) == 3 and each.logprob <= 0 for each in scored.logprobs.content)
    assert all(each.token == each.top_logprobs[0].token for each in scored.logprobs.content), "greedy"
    raw = b"".join(bytes(each.bytes or ()) for each in scored.logprobs.content)
    assert (scored.message.content or "") in raw.decode()
    warm = CHAT | given(temperature=1.0, seed=11, n=2, max_completion_tokens=8)
    first, again = (client.chat.completions.create(**warm).choices for _ in range(2))
    assert [each.message.content for each in first] == [each.message.content for each in again]
    assert first[0].message.content != first[1].message.content
    assert [each.finish_reason for each in first] == ["length", "length"]
    cut = client.chat.completions.create(**CHAT, stop=["France"]).choices[0]
    assert (
        cut.finish_reason == "stop"
        and cut.message.content == (scored.message.content or "").partition("France")[0]
    )
    (token,) = llm.tokenizer.encode(" river", add_special=False)
    biased = client.chat.completions.create(
        **CHAT | given(max_completion_tokens=3), logit_bias={str(token): 100}
    )
    assert biased.choices[0].message.content == " river river river"


def test_forms_and_tools(client: OpenAI):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    schema["additionalProperties"] = False
    form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    asked = CHAT | given(max_completion_tokens=60)
    answer = client.chat.completions.create(**asked, response_format=form).choices[0]
    assert json.loads(answer.message.content or "") in ({"n": 1}, {"n": 2})
    anything = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    assert (anything.message.content or "").lstrip().startswith("{")
    for choice in ("auto", "required"):
        with pytest.raises(openai.BadRequestError, match="its chat template ignores them") as error:
            client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice=choice)
        assert (error.value.param, error.value.code) == ("tools", "unsupported")
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    called: dict[str, Any] = {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": calls}]}
    with pytest.raises(openai.BadRequestError, match="its chat template ignores them"):
        client.chat.completions.create(**CHAT | called)
    without = client.chat.completions.create(**CHAT, tools=TOOLS, tool_choice="none")
    assert "Paris" in (without.choices[0].message.content or "")


def test_what_vllm_adds(client: OpenAI, llm: LLM):
    def text(**more: Any) -> Any:
        return client.completions.create(**FRANCE | given(temperature=1.0, seed=3), extra_body=more).choices[
            0
        ]

    greedy = client.completions.create(**FRANCE).choices[0].text
    assert text(top_k=1).text == text(min_p=1.0).text == greedy
    assert text(repetition_penalty=1.5).text != text(repetition_penalty=1.0).text
    (first, *_) = llm.tokenizer.encode(greedy, add_special=False, continues=True)
    stopped = text(top_k=1, stop_token_ids=[first])
    assert stopped.finish_reason == "stop"
    assert text(top_k=1, stop_token_ids=[first], min_tokens=2).finish_reason == "length"
    (end, *_) = sorted(llm.tokenizer.eog_ids)
    ended = {"logit_bias": {str(end): 100}}
    spelled = text(**ended, ignore_eos=True, skip_special_tokens=False).text
    assert spelled == 4 * llm.tokenizer.token_text(end)
    assert text(**ended).finish_reason == "stop" and text(**ended, ignore_eos=True).finish_reason == "length"
    scored = text(prompt_logprobs=1).model_extra["prompt_logprobs"]
    assert scored[0] is None and len(scored) == len(llm.tokenizer.encode(FRANCE["prompt"]))
    long = GREEDY | given(prompt="word " * 150, max_tokens=1)

    def reused(salt: str) -> Any:
        usage = client.completions.create(**long, extra_body={"cache_salt": salt}).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens

    assert (reused("a"), reused("b")) == (0, 0) and reused("a") > 0
    thinking = {"chat_template_kwargs": {"enable_thinking": False}}
    assert client.chat.completions.create(**CHAT, extra_body=thinking).choices[0].message.content


def test_models_and_embeddings(client: OpenAI, llm: LLM):
    assert [model.id for model in client.models.list()] == [MODEL] == [client.models.retrieve(MODEL).id]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**CHAT | given(model="gpt-4"))
    found = client.embeddings.create(model=MODEL, input=["Paris", "Paris", "Rome"])
    vectors = [each.embedding for each in found.data]
    assert len(vectors[0]) == llm.model.config.hidden_size and vectors[0] == vectors[1] != vectors[2]
    floats = client.embeddings.create(model=MODEL, input="Paris", encoding_format="float")
    assert floats.data[0].embedding == pytest.approx(vectors[0])


def test_the_other_routes(server: RealmServer):
    address = server.address
    tokens = post(address, "/tokenize", {"prompt": "Hello world", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"]) == 2
    assert post(address, "/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "Hello world"}
    text = post(address, "/apply-template", {"messages": MESSAGES}).json()["prompt"]
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert httpx.get(f"{address}/props").json()["chat_template"]
    assert httpx.get(f"{address}/version").json()["version"]
    metrics = httpx.get(f"{address}/metrics").text
    assert "realm:generation_tokens_total" in metrics and "realm:time_to_first_token_seconds" in metrics


def test_node(server: RealmServer, client: OpenAI, tmp_path: Path):
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node or npm here")
    package = HERE.parent / "examples" / "clients" / "package.json"
    for file in (package, HERE / "conformance.mjs"):
        shutil.copy(file, tmp_path)
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent", "--prefer-offline"]
    subprocess.run(install, cwd=tmp_path, check=True)
    done = subprocess.run(
        ["node", "conformance.mjs", server.address],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["models"] == [MODEL] and told["model"] == MODEL
    here = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    there = told["chat"]["choices"]
    assert there[0]["message"]["content"] == here.choices[0].message.content
    assert there[0]["logprobs"] == here.choices[0].model_dump(exclude_unset=True)["logprobs"]
    assert told["stream"]["text"] == there[0]["message"]["content"]
    assert told["stream"]["reasons"] == [there[0]["finish_reason"]]
    assert told["stream"]["usage"]["completion_tokens"] == told["chat"]["usage"]["completion_tokens"]
    assert [choice["index"] for choice in told["several"]["choices"]] == [0, 1]
    assert all("." not in choice["message"]["content"] for choice in told["several"]["choices"])
    assert json.loads(told["json"]["choices"][0]["message"]["content"])["capital"] in ("Paris", "Rome")
    said = client.completions.create(**FRANCE).choices[0].text
    assert told["completion"]["choices"][0]["text"] == FRANCE["prompt"] + said
    assert told["completionStream"]["text"] == said
    assert len(told["completions"]["choices"]) == 4
    assert told["embeddings"] == [576, 576]
    assert told["refused"] == {
        "tools": {"status": 400, "param": "tools", "kind": "BadRequestError"},
        "best_of": {"status": 400, "param": "best_of", "kind": "BadRequestError"},
        "model": {"status": 404, "param": "model", "kind": "NotFoundError"},
    }
