"""Adapters over HTTP: listed under the model, chosen by name, and the same as in Python."""

from collections.abc import Iterator

import pytest
from openai import OpenAI
from running_server import PATIENCE, post, running
from test_lora_applied import random_adapter
from tiny import write_model

from realm_jax import LLM, SamplingParams
from realm_jax.serving.bodies import COMPLETIONS
from realm_jax.serving.server.process import RealmServer

pytestmark = pytest.mark.unoptimized

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model of one layer, with an adapter by name."""
    path = write_model(tmp_path_factory.mktemp("small") / "small.gguf", layers=1)
    llm = LLM(path, max_num_seqs=4, ctx_size=256, max_num_batched_tokens=64)
    llm.engine.load_adapter("poet", random_adapter(llm, seed=1, rank=4))
    return llm


@pytest.fixture(scope="module")
def expected(llm: LLM) -> list[str]:
    """What the model says, and what it says with the adapter."""
    lora = [None, "poet", [("poet", 0.5)]]
    return [output.text for output in llm.generate(["a b c"] * 3, GREEDY, lora=lora)]


@pytest.fixture(scope="module")
def server(llm: LLM, expected: list[str]) -> Iterator[RealmServer]:
    with running(llm) as server:
        yield server


def test_a_models_adapters_are_models(server: RealmServer, expected: list[str]) -> None:
    with OpenAI(base_url=f"{server.address}/v1", api_key="none", timeout=PATIENCE) as client:
        listed = {each.id: getattr(each, "parent", None) for each in client.models.list()}
    assert listed == {"tiny": None, "alias": None, "poet": "tiny"}
    body = {"prompt": "a b c", "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    asked = [{"model": "tiny"}, {"model": "poet"}, {"lora": [["poet", 0.5]]}]
    answers = [post(server.address, COMPLETIONS, body | each).json() for each in asked]
    assert [answer["choices"][0]["text"] for answer in answers] == expected
    assert [answer["model"] for answer in answers] == ["tiny", "poet", "tiny"]
    assert len(set(expected)) > 1, "the adapter changes nothing"


def test_prefixes_are_reused_within_a_salt_alone(server: RealmServer) -> None:
    body = {"prompt": "a b c d " * 30, "max_tokens": 1, "cache_salt": "mine"}

    def cached(salt: str) -> int:
        answer = post(server.address, COMPLETIONS, body | {"cache_salt": salt}).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(salt) > 0 for salt in ("mine", "mine", "yours", "yours")] == [False, True, False, True]
