"""Several tenants on one server: each sees what is its own, within its limits, and nothing of the others."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from running_server import PATIENCE, post, running
from test_lora_applied import random_adapter
from tiny import write_model
from websockets.sync.client import connect

from realm_jax import LLM
from realm_jax.serving.bodies import CHAT, COMPLETIONS
from realm_jax.serving.keys import KeyStore
from realm_jax.serving.server.tenancy import Tenancy
from realm_jax.serving.tenants import EVERY, Tenant

pytestmark = pytest.mark.unoptimized

BODY = {"prompt": "a b c", "temperature": 0, "max_tokens": 4, "ignore_eos": True}
TENANTS = (
    Tenant("ann", adapters=("poet",), system_prompt="You are brief."),
    Tenant("bob", adapters=("clerk",), default_adapter="clerk", max_tokens=8, weight=2),
    Tenant("few", requests_per_minute=2, concurrent_requests=1, tokens_per_minute=500),
    Tenant("ops", adapters=(EVERY,), is_admin=True),
)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A server, the model behind it, and a key of each tenant."""
    folder = tmp_path_factory.mktemp("tenants")
    llm = LLM(
        write_model(folder / "small.gguf", layers=1),
        max_num_seqs=4,
        ctx_size=256,
        max_num_batched_tokens=64,
        deterministic=True,
    )
    for seed, name in enumerate(("poet", "clerk")):
        llm.engine.load_adapter(name, random_adapter(llm, seed=seed, rank=4))
    (folder / "adapters").mkdir()
    (folder / "adapters" / "broken.gguf").write_bytes(b"GGUF")
    (folder / "secret.gguf").write_bytes(b"GGUF")
    with KeyStore(folder / "keys" / "keys.sqlite") as store:
        keys = {tenant.name: store.create(tenant.name) for tenant in TENANTS} | {"gone": store.create("gone")}
        tenancy = Tenancy(store, {tenant.name: tenant for tenant in TENANTS})
        with running(llm, tenancy=tenancy, adapter_folder=folder / "adapters") as server:
            texts = {name: made.text for name, made in keys.items()}
            ids = {name: made.key.id for name, made in keys.items()}
            yield SimpleNamespace(llm=llm, address=server.address, keys=texts, ids=ids, store=store)


def ask(setting: SimpleNamespace, tenant: str | None, path: str, body: object = None) -> httpx.Response:
    headers = {} if tenant is None else {"authorization": f"Bearer {setting.keys.get(tenant, tenant)}"}
    if body is None:
        return httpx.get(setting.address + path, headers=headers, timeout=PATIENCE)
    return post(setting.address, path, body, headers=headers)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_everything_but_health_and_the_page_needs_a_key(setting: SimpleNamespace):
    for path in ("/health", "/", "/page.css", "/page.js"):
        assert ask(setting, None, path).status_code == 200
    for path in (
        "/v1/models",
        "/metrics",
        "/props",
        "/tokenizer_info",
        "/version",
        "/openapi.json",
        "/nowhere",
    ):
        refused = ask(setting, None, path)
        assert error(refused, 401)["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    wrong = setting.keys["ann"][:-1] + ("0" if setting.keys["ann"][-1] != "0" else "1")
    assert (
        error(ask(setting, wrong, COMPLETIONS, BODY), 401)["message"]
        == (error(ask(setting, "realm-" + "0" * 12 + "-" + "0" * 64, COMPLETIONS, BODY), 401)["message"])
    )
    assert "gone" in error(ask(setting, "gone", COMPLETIONS, BODY), 403)["message"]


def test_an_adapter_of_another_tenant_does_not_exist(setting: SimpleNamespace):
    def listed(tenant: str) -> list[str]:
        return [each["id"] for each in ask(setting, tenant, "/v1/models").json()["data"]]

    assert listed("ann") == ["tiny", "alias", "poet"]
    assert listed("bob") == ["tiny", "alias", "clerk"]
    assert listed("ops") == ["tiny", "alias", "poet", "clerk"]

    def refusal(name: str) -> tuple[Any, ...]:
        said = error(ask(setting, "bob", COMPLETIONS, BODY | {"model": name}), 404)
        looked = error(ask(setting, "bob", f"/v1/models/{name}"), 404)
        named = error(ask(setting, "bob", COMPLETIONS, BODY | {"lora": name}), 403)
        return tuple(each["message"].replace(name, "NAME") for each in (said, looked, named))

    assert refusal("poet") == refusal("nothing-of-this-name")


def test_defaults_of_a_tenant(setting: SimpleNamespace):
    plain = ask(setting, "ann", COMPLETIONS, BODY).json()["choices"][0]["text"]
    clerk = ask(setting, "bob", COMPLETIONS, BODY).json()["choices"][0]["text"]
    by_name = ask(setting, "ops", COMPLETIONS, BODY | {"model": "clerk"}).json()["choices"][0]["text"]
    assert plain == ask(setting, "ops", COMPLETIONS, BODY).json()["choices"][0]["text"]
    assert clerk == by_name
    question = [{"role": "user", "content": "Hello"}]
    system = [{"role": "system", "content": "You are brief."}]

    def prompt_tokens(tenant: str, messages: list[dict[str, str]]) -> int:
        answer = ask(setting, tenant, CHAT, {"messages": messages, "max_tokens": 1})
        return answer.json()["usage"]["prompt_tokens"]

    assert prompt_tokens("ann", question) == prompt_tokens("ops", system + question)
    assert prompt_tokens("ann", question) > prompt_tokens("ops", question)
    assert prompt_tokens("ann", system + question) == prompt_tokens("ops", system + question)


def test_limits_of_a_tenant(setting: SimpleNamespace):
    assert "may have 8" in error(ask(setting, "bob", COMPLETIONS, BODY | {"max_tokens": 9}), 400)["message"]
    assert (
        "500" in error(ask(setting, "few", COMPLETIONS, BODY | {"n": 3, "max_tokens": 200}), 400)["message"]
    )
    for _ in range(2):
        assert ask(setting, "few", COMPLETIONS, BODY).status_code == 200
    refused = ask(setting, "few", COMPLETIONS, BODY)
    assert error(refused, 429)["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert ask(setting, "ann", COMPLETIONS, BODY).status_code == 200  # the others' are their own


def test_prefixes_are_not_shared_between_tenants(setting: SimpleNamespace):
    body = BODY | {"prompt": "d e f g " * 40, "max_tokens": 1}

    def cached(tenant: str) -> int:
        usage = ask(setting, tenant, COMPLETIONS, body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert [cached(tenant) > 0 for tenant in ("ann", "ann", "ops", "ops")] == [False, True, False, True]


def test_figures_are_the_tenants_own(setting: SimpleNamespace):
    for tenant in ("ann", "bob"):
        ask(setting, tenant, COMPLETIONS, BODY)

    def lines(tenant: str) -> str:
        text = ask(setting, tenant, "/metrics").text
        return "\n".join(line for line in text.splitlines() if not line.startswith("#"))

    assert 'tenant="ann"' in lines("ann")
    assert "bob" not in lines("ann")
    assert "num_requests_running" not in lines("ann")
    assert all(each in lines("ops") for each in ('tenant="ann"', 'tenant="bob"', "num_requests_running"))


def test_adapters_are_loaded_by_admins_from_their_folder(setting: SimpleNamespace):
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    asked = {"lora_name": "new", "lora_path": "broken.gguf"}
    assert "is_admin" in error(ask(setting, "ann", load, asked), 403)["message"]
    assert "is_admin" in error(ask(setting, "ann", unload, {"lora_name": "poet"}), 403)["message"]
    for path in ("../secret.gguf", "/etc/passwd", "nothing.gguf", ".", "", "a\0b", "x" * 5000):
        said = error(ask(setting, "ops", load, asked | {"lora_path": path}), 400)["message"]
        assert said == "lora_path names nothing in the folder of adapters; give a path within it"
    broken = ask(setting, "ops", load, asked)
    assert 400 <= broken.status_code < 600
    assert "broken.gguf" in error(broken, broken.status_code)["message"]
    assert error(ask(setting, "ops", unload, {"lora_name": "new"}), 404)["code"] == "not_found"
    assert error(ask(setting, "ops", load, asked | {"lora_name": "tiny"}), 400)
    assert ask(setting, "ann", COMPLETIONS, BODY | {"model": "poet"}).status_code == 200


def test_a_websocket_says_who_it_is_first(setting: SimpleNamespace):
    def call(socket: Any, function: str, params: object = None, **more: object) -> dict[str, Any]:
        socket.send(json.dumps({"id": 1, "function": function, "params": params or {}} | more))
        while (item := json.loads(socket.recv(timeout=PATIENCE)))["status"] == "streaming":
            pass
        return item

    address = setting.address.replace("http", "ws") + "/ws"
    with connect(address, open_timeout=PATIENCE) as socket:
        assert call(socket, "generate", BODY)["data"]["code"] == "invalid_api_key"
        assert call(socket, "authenticate", {"key": "realm-no"})["status"] == "error"
        assert call(socket, "metadata")["status"] == "error"
        assert call(socket, "authenticate", {"key": setting.keys["ann"]})["data"] == {"tenant_id": "ann"}
        assert call(socket, "generate", BODY, tenant_id="bob")["data"]["code"] == "forbidden"
        assert call(socket, "generate", BODY | {"model": "clerk"})["data"]["code"] == "model_not_found"
        assert call(socket, "generate", BODY | {"model": "poet"}, tenant_id="ann")["status"] == "complete"
        made = setting.store.create("ann")
        assert call(socket, "authenticate", {"key": made.text})["status"] == "complete"
        setting.store.revoke(made.key.id)
        assert call(socket, "metadata")["data"]["code"] == "invalid_api_key"
    headers = {"Authorization": f"Bearer {setting.keys['bob']}"}
    with connect(address, open_timeout=PATIENCE, additional_headers=headers) as socket:
        assert call(socket, "generate", BODY, tenant_id="bob")["status"] == "complete"


def test_a_revoked_key_counts_no_more_and_no_key_is_logged(
    setting: SimpleNamespace, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.DEBUG):
        made = setting.store.create("ann")
        setting.keys["second"] = made.text
        assert ask(setting, "second", COMPLETIONS, BODY).status_code == 200
        setting.store.revoke(made.key.id)
        error(ask(setting, "second", COMPLETIONS, BODY), 401)
    logged = str([vars(record) for record in caplog.records])
    assert "invalid_api_key" in logged
    assert not any(key.rpartition("-")[2] in logged for key in setting.keys.values())


def test_before_any_key_was_made_every_key_counts(tiny_model: Path, tmp_path: Path):
    llm = LLM(tiny_model, max_num_seqs=4, ctx_size=64, deterministic=True)
    with KeyStore(tmp_path / "keys.sqlite") as store, running(llm, tenancy=Tenancy(store)) as server:
        any_key = {"authorization": "Bearer whatever"}
        assert httpx.get(f"{server.address}/v1/models", headers=any_key).status_code == 200
        key = store.create("first").text
        assert httpx.get(f"{server.address}/v1/models", headers=any_key).status_code == 401
        mine = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{server.address}/v1/models", headers=mine).status_code == 200
