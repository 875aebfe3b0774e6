"""lm_eval's own clients of OpenAI's API, unchanged, against the server: the scores are `realm eval`'s."""

import json
from collections.abc import Iterator
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from running_server import running
from test_evaluation import CHOICES, CONTEXT, QUESTIONS, TASKS
from tiny import TEMPLATE, write_model

from realm_jax import LLM
from realm_jax.evaluation import RealmLM

for needed in ("tenacity", "aiohttp", "requests"):
    pytest.importorskip(needed, reason="lm_eval's clients need lm_eval[api]")

pytestmark = pytest.mark.unoptimized

NAMES = ("local_choice", "local_writing")


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """A task of choices and one of writing. Texts begin with BOS, which these clients do not add."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": each, "choices": CHOICES, "label": i % 3, "written": ""}
        for i, each in enumerate(QUESTIONS)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    for name in NAMES:
        data = f"{{data_files: {{test: {folder / 'data.jsonl'}}}, cache_dir: {folder / 'cache'}}}"
        common = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(common + 'doc_to_text: "<s>{{question}}"' + TASKS[name])
    return TaskManager(include_path=folder, include_defaults=False)


def evaluated(manager: TaskManager, tasks: tuple[str, ...], model: Any, **options: Any) -> dict[str, Any]:
    """What the model answered to each request of each task, and the scores."""
    evaluate: Any = lm_eval.simple_evaluate
    found = evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    answers = {name: [each["resps"] for each in found["samples"][name]] for name in tasks}
    return {"answers": answers, "results": found["results"]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A tiny llama whose template begins with BOS; the shapes of test_evaluation.py."""
    path = tmp_path_factory.mktemp("model") / "tiny-eval.gguf"
    write_model(path, template="{{ bos_token }}" + TEMPLATE)
    return LLM(path, dtype="float32", ctx_size=CONTEXT, max_num_seqs=32)


@pytest.fixture(scope="module")
def expected(llm: LLM, manager: TaskManager) -> tuple[dict[str, Any], dict[str, Any]]:
    """In process, before anyone serves: without a chat template, and with it."""
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": False}
    return (
        evaluated(manager, NAMES, RealmLM(llm)),
        evaluated(manager, NAMES[1:], RealmLM(llm), **chat),
    )


@pytest.fixture(scope="module")
def address(llm: LLM, expected: object) -> Iterator[str]:
    with running(llm) as server:
        yield server.address


@pytest.mark.parametrize("concurrent", [1, 4])
def test_completions_score_as_the_engine_does(
    manager: TaskManager, address: str, expected: tuple[dict[str, Any], ...], concurrent: int
) -> None:
    """Token ids with `echo` and `logprobs`; the client finds the tokenizer at the server by itself."""
    given = f"model=tiny,base_url={address}/v1/completions,num_concurrent={concurrent},max_retries=1"
    found = evaluated(manager, NAMES, "local-completions", model_args=f"{given},max_length={CONTEXT}")
    assert found["answers"] == expected[0]["answers"]
    assert found["results"] == expected[0]["results"]


def test_chat_completions_write_as_the_engine_does(
    manager: TaskManager, address: str, expected: tuple[dict[str, Any], ...]
) -> None:
    given = f"model=tiny,base_url={address}/v1/chat/completions,num_concurrent=3,max_retries=1"
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": False}
    found = evaluated(manager, NAMES[1:], "local-chat-completions", model_args=given, **chat)
    assert found["answers"] == expected[1]["answers"]
    assert found["answers"] != expected[0]["answers"]
