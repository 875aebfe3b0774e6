"""Bodies made from the server's own description, valid and not: none is answered with a server's fault."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from running_server import PATIENCE, running
from schemathesis import GenerationMode
from tiny import TEMPLATE

from realm_jax import LLM
from realm_jax.serving.server.limits import Limits

pytestmark = pytest.mark.unoptimized

LIMITS = Limits(body_bytes=1 << 16, prompts=2, n=2, sequences=2)
HEALTH = (HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large)


@pytest.fixture(scope="module")
def address(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    llm = LLM(tiny_model, max_num_seqs=4, ctx_size=64, max_num_batched_tokens=64, deterministic=True)
    with running(llm, limits=LIMITS, adapter_folder=tmp_path_factory.mktemp("adapters")) as server:
        yield server.address


def test_the_tokenizer_is_described(address: str):
    found = httpx.get(f"{address}/tokenizer_info").json()
    assert (found["bos_token"], found["eos_token"], found["add_bos_token"]) == ("<s>", "</s>", True)
    assert found["chat_template"] == TEMPLATE


def test_no_body_is_a_fault_of_the_server(address: str):
    described: Any = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 12
    for operation in operations:
        for mode in GenerationMode:
            check(operation, mode)


def check(operation: Any, mode: GenerationMode) -> None:
    """Bodies that keep to the description, or break it, are answered well or refused with a reason."""

    @settings(max_examples=8, deadline=None, database=None, suppress_health_check=HEALTH, derandomize=True)
    @given(case=operation.as_strategy(generation_mode=mode))
    def answered(case: Any) -> None:
        response = case.call(timeout=PATIENCE)
        assert response.status_code < 500, response.text
        if response.status_code >= 400 and case.method != "HEAD":
            assert response.json()["error"]["message"]

    with suppress(Unsatisfiable):  # an operation without parameters has no broken ones
        answered()
