"""Several models in one server: each says what it says alone, loaded when asked for, unloaded for others."""

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jax
import psutil
import pytest
from running_server import (
    PATIENCE,
    metric,
    post,
    raw_post,
    read_events,
    running_models,
    wait_for,
)
from test_lora_applied import random_adapter
from tiny import write_model
from websockets.sync.client import connect

from realm_jax import LLM, SamplingParams
from realm_jax.errors import CapacityError
from realm_jax.lora.export import write_gguf
from realm_jax.serving.bodies import COMPLETIONS
from realm_jax.serving.keys import KeyStore
from realm_jax.serving.model_entries import ModelEntry
from realm_jax.serving.server.model_loader import ModelLoader
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.pooled_model import InMemory, PooledModel
from realm_jax.serving.server.process import RealmServer, Settings
from realm_jax.serving.server.tenancy import Tenancy
from realm_jax.serving.tenants import EVERY, Tenant

pytestmark = pytest.mark.unoptimized

OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4,
    "ctx_size": 1024,
    "max_num_batched_tokens": 64,
    "spec_tokens": 3,
}
OPTIONS |= {"deterministic": True}  # which has the fewest programs to compile
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BODY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
PROMPTS = ["a b c", "d e", "f " * 70, "g"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two models as files, an adapter of the first, and what each says alone."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: write_model(folder / f"{name}.gguf", layers=1, seed=i) for i, name in enumerate("ab")}
    llms = {name: LLM(path, **OPTIONS) for name, path in paths.items()}
    texts = {name: [o.text for o in llm.generate(PROMPTS, GREEDY)] for name, llm in llms.items()}
    assert not set(texts["a"]) & set(texts["b"])
    poet, a = folder / "poet.gguf", llms["a"]
    write_gguf(random_adapter(a, seed=1, rank=4), a.model.base, poet)
    a.load_adapter("poet", poet)
    texts["poet"] = [output.text for output in a.generate(PROMPTS, GREEDY, lora="poet")]
    return SimpleNamespace(folder=folder, paths=paths, llms=llms, texts=texts, poet=poet)


def model(name: str, path: Path, *, adapters: Mapping[str, Path] | None = None, **more: Any) -> PooledModel:
    """A model of a file, loaded when it is asked for."""
    draft = more.pop("draft_model", None)
    entry = ModelEntry((name, f"{name}-alias"), path, draft, adapters or {})
    loader = ModelLoader(entry, OPTIONS)
    return PooledModel(ModelNames(entry.names), loader, dict(entry.adapters), **more)


def say(address: str, name: str, i: int, **more: Any) -> str:
    answer = post(address, COMPLETIONS, {"model": name, "prompt": PROMPTS[i], **BODY, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def status(address: str) -> dict[str, str]:
    listed = httpx.get(f"{address}/v1/models", timeout=PATIENCE).json()["data"]
    return {each["id"]: each["status"]["value"] for each in listed if "alias" not in each["id"]}


def loads(address: str, name: str) -> float:
    return metric(address, "model_loads_total", f'model_name="{name}"')


def test_each_says_what_it_says_alone_and_is_loaded_when_asked_for(given: SimpleNamespace) -> None:
    """The second with a draft, which changes nothing but the figures; on every route that takes a model."""
    models = [
        model("a", given.paths["a"], adapters={"poet": given.poet}),
        model("b", given.paths["b"], draft_model=given.paths["b"]),
    ]
    with running_models(models, adapter_folder=given.folder) as server:
        address = server.address
        assert status(address) == {"a": "unloaded", "poet": "unloaded", "b": "unloaded"}
        assert httpx.get(f"{address}/props").json().keys() == {"model", "status", "version"}
        assert say(address, "b-alias", 0) == given.texts["b"][0]
        assert status(address) == {"a": "unloaded", "poet": "unloaded", "b": "loaded"}

        cases = [(name, i) for name in ("a", "b", "poet") for i in range(len(PROMPTS))] * 2
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda case: say(address, *case), cases))
        assert found == [given.texts[name][i] for name, i in cases]
        assert [loads(address, name) for name in "ab"] == [1, 1]
        assert say(address, "a", 0, model=None) == given.texts["a"][0]  # the first is the one not named

        accepted = "spec_decode_num_accepted_tokens_total"
        assert metric(address, accepted, 'model_name="b"') > 0 == metric(address, accepted, 'model_name="a"')
        tokens = {name: metric(address, "generation_tokens_total", f'model_name="{name}"') for name in "ab"}
        assert tokens == {"a": 8 * 17, "b": 8 * 9}

        props = httpx.get(f"{address}/props?model=b").json()
        assert props["model"] == "b" and props["draft_model"] == "b" and props["ctx_size"] == 1024
        parents = {each["id"]: each["parent"] for each in httpx.get(f"{address}/v1/models").json()["data"]}
        assert parents == {"a": None, "a-alias": None, "poet": "a", "b": None, "b-alias": None}
        for path, body in (("/tokenize", {"prompt": "a b"}), ("/v1/embeddings", {"input": "a b"})):
            assert post(address, path, body | {"model": "b"}).status_code == 200
            assert post(address, path, body | {"model": "c"}).json()["error"]["code"] == "model_not_found"
        vectors = [
            post(address, "/v1/embeddings", {"input": "a b", "model": name}).json()["data"] for name in "ab"
        ]
        assert vectors[0] != vectors[1]
        with connect(address.replace("http", "ws") + "/ws", open_timeout=PATIENCE) as socket:
            for name in ("b", "poet"):
                params = {"model": name, "prompt": PROMPTS[1], "stream": False, **BODY}
                socket.send(json.dumps({"id": 1, "function": "generate", "params": params}))
                item = json.loads(socket.recv(timeout=PATIENCE))
                assert item["data"]["choices"][0]["text"] == given.texts[name][1]
            socket.send(json.dumps({"id": 2, "function": "metadata", "params": {"model": "b"}}))
            assert json.loads(socket.recv(timeout=PATIENCE))["data"]["model"] == "b"


def test_models_take_turns_in_the_budget(given: SimpleNamespace) -> None:
    """Room for one: the other's request unloads it, but never while it runs."""
    models = [model(name, given.paths[name]) for name in "ab"]
    needed = models[0].loader.needed_bytes({}, 1 << 40)
    assert models[0].loader.needed_bytes({"poet": given.poet}, 1 << 40) > needed
    assert needed > given.paths["a"].stat().st_size
    with running_models(models, memory=int(1.5 * needed)) as server:
        address = server.address
        assert say(address, "a", 0) == given.texts["a"][0]
        stream = raw_post(
            address, COMPLETIONS, {"model": "a", "prompt": "a", **BODY, "max_tokens": 900, "stream": True}
        )
        wait_for(lambda: metric(address, "num_requests_running", 'model_name="a"') == 1)
        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(say, address, "b", 1)
            wait_for(lambda: models[0].is_leaving)
            behind = pool.submit(say, address, "a", 1)  # comes later, and waits for its turn
            assert status(address) == {"a": "loaded", "b": "loading"} and not other.done()
            *_, last = read_events(stream)
            stream.close()
            assert last["choices"][0]["finish_reason"] == "length", "it was cut off"
            assert other.result() == given.texts["b"][1] and behind.result() == given.texts["a"][1]
        assert [loads(address, name) for name in "ab"] == [2, 1]
        assert metric(address, "model_loaded") == 1 and status(address) == {"a": "loaded", "b": "unloaded"}


def test_adapters_loaded_later_are_there_when_their_model_comes_back(given: SimpleNamespace) -> None:
    models = [model(name, given.paths[name]) for name in "ab"]
    load = {"lora_name": "bard", "lora_path": "poet.gguf", "model": "a"}
    with running_models(models, adapter_folder=given.folder, idle_seconds=0.3) as server:
        address = server.address
        missing = post(address, "/v1/load_lora_adapter", load | {"model": None})
        assert missing.status_code == 400 and "whose adapter" in missing.text
        for taken in ("b", "a-alias"):
            assert post(address, "/v1/load_lora_adapter", load | {"lora_name": taken}).status_code == 400
        assert post(address, "/v1/load_lora_adapter", load).json()["parent"] == "a"
        wait_for(lambda: status(address) == {"a": "unloaded", "bard": "unloaded", "b": "unloaded"})
        assert say(address, "bard", 2) == given.texts["poet"][2]
        assert post(address, "/v1/unload_lora_adapter", {"lora_name": "bard"}).json()["deleted"]
        assert status(address).keys() == {"a", "b"} and loads(address, "b") == 0


class Watched(ModelLoader):
    """A loader whose models are seen to go: the last one is referred to weakly."""

    seen: "weakref.ref[LLM] | None" = None

    def load(self, adapters: Mapping[str, Path], memory_limit: int | None) -> LLM:
        llm = super().load(adapters, memory_limit)
        type(self).seen = weakref.ref(llm)
        return llm


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays())


def test_an_idle_model_leaves_nothing_in_memory(given: SimpleNamespace) -> None:
    """Weights, caches and the bank of adapters: no array of it lives on, nor anything else."""
    entry = ModelEntry(("b",), given.paths["b"])
    pooled = PooledModel(ModelNames(("b",)), Watched(entry, OPTIONS), {"poet": given.poet})
    gc.collect()
    with running_models([pooled], idle_seconds=0.2) as server:
        before = live_bytes()
        for n in (1, 2):
            body = {"model": "poet", "prompt": "a", **BODY, "stream": True, "logprobs": 2}
            stream = raw_post(server.address, COMPLETIONS, body)
            wait_for(lambda: live_bytes() > before + given.paths["b"].stat().st_size)
            read_events(stream)
            stream.close()
            wait_for(lambda: status(server.address)["b"] == "unloaded")
            wait_for(lambda: Watched.seen is not None and Watched.seen() is None)
            wait_for(lambda: live_bytes() <= before)
            assert loads(server.address, "b") == n


def test_memory_of_unloaded_models_is_the_systems_again(tmp_path: Path) -> None:
    """As the kernel counts it: however often models come and go, the process does not grow."""
    path = write_model(tmp_path / "large.gguf", layers=2, width=512, ffn=4096)
    process, size = psutil.Process(), path.stat().st_size
    with running_models([model("large", path)], idle_seconds=0.01) as server:
        after: list[int] = []
        for n in range(1, 5):
            assert post(server.address, "/tokenize", {"prompt": "a"}).status_code == 200
            assert loads(server.address, "large") == n
            wait_for(lambda: not server.pool._turn.locked() and status(server.address)["large"] == "unloaded")
            after.append(process.memory_info().rss)
    assert after[-1] - after[0] < 0.5 * size, [each // 10**6 for each in after]


def test_a_broken_model_harms_nothing_and_may_be_mended(given: SimpleNamespace, tmp_path: Path) -> None:
    path = tmp_path / "c.gguf"
    path.write_bytes(given.paths["b"].read_bytes()[:-1000])
    models = [model("a", given.paths["a"], preload=True), model("c", path, preload=True)]
    with running_models(models, memory=1 << 30) as server:
        address = server.address
        assert httpx.get(f"{address}/health").json() == {"status": "ok"}
        for _ in range(2):
            refused = post(address, COMPLETIONS, {"model": "c", "prompt": "a"})
            assert refused.status_code == 500 and refused.json()["error"]["code"] == "model_load_failed"
            assert str(tmp_path) not in refused.text
        listed = httpx.get(f"{address}/v1/models/c").json()
        assert listed["status"] == {"value": "unloaded", "failed": True}
        assert say(address, "a", 3) == given.texts["a"][3] and loads(address, "a") == 1
        shutil.copy(given.paths["b"], path)
        assert say(address, "c", 3) == given.texts["b"][3]
        assert httpx.get(f"{address}/v1/models/c").json()["status"] == {"value": "loaded"}


def test_what_can_never_fit_ends_the_server_at_its_start(given: SimpleNamespace) -> None:
    models = [model(name, given.paths[name]) for name in "ab"]
    server = RealmServer(Settings(port=0, memory=100_000), models)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            server.run_to_end()
        except CapacityError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(PATIENCE)
    (error,) = errors
    assert str(error).startswith("model a: weights take") and "memory is 0.1 MB" in str(error)


def test_tenants_see_the_models_that_they_may_use(given: SimpleNamespace, tmp_path: Path) -> None:
    tenants = (
        Tenant("all", adapters=(EVERY,)),
        Tenant("one", models=("b",), adapters=(EVERY,)),
        Tenant("poets", adapters=("poet",), default_adapter="poet"),
    )
    models = [
        PooledModel(ModelNames((name,)), InMemory(given.llms[name]), preload=True) for name in ("a", "b")
    ]
    with KeyStore(tmp_path / "keys.sqlite") as store:
        keys = {tenant.name: store.create(tenant.name).text for tenant in tenants}
        with running_models(models, tenancy=Tenancy(store, {t.name: t for t in tenants})) as server:

            def ask(tenant: str, **body: Any) -> Any:
                headers = {"authorization": f"Bearer {keys[tenant]}"}
                answer = post(
                    server.address, COMPLETIONS, {"prompt": PROMPTS[0], **BODY, **body}, headers=headers
                )
                return answer.json()["choices"][0]["text"] if answer.is_success else answer.status_code

            def listed(tenant: str) -> list[str]:
                headers = {"authorization": f"Bearer {keys[tenant]}"}
                answer = httpx.get(f"{server.address}/v1/models", headers=headers, timeout=PATIENCE)
                return [each["id"] for each in answer.json()["data"]]

            texts = {name: each[0] for name, each in given.texts.items()}
            assert listed("all") == ["a", "poet", "b"] == listed("poets") and listed("one") == ["b"]
            assert ask("all") == texts["a"] and ask("one") == texts["b"] and ask("poets") == texts["poet"]
            assert ask("poets", model="b") == texts["b"]  # which has no such adapter
            assert [ask("one", model=name) for name in ("a", "poet", "b")] == [404, 404, texts["b"]]


@pytest.fixture(autouse=True)
def no_threads_stay() -> Iterator[None]:
    """A server that has ended has no thread left."""
    yield
    wait_for(lambda: not [t.name for t in threading.enumerate() if t.name.startswith(("loader", "engine"))])
