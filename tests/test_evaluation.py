"""`realm eval`: what lm_eval reports is what `LLM.score` and `LLM.generate` say."""

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import lm_eval
import lm_eval.tasks
import pytest
from command_line import realm
from lm_eval.tasks import TaskManager
from tiny import TEMPLATE, write_model

import realm_jax
from realm_jax import LLM, SamplingParams
from realm_jax.evaluation import RealmLM

pytestmark = pytest.mark.unoptimized

CONTEXT = 256
FLOAT32 = ("--dtype", "float32", "-c", CONTEXT)  # the shapes of `llm`, 32 sequences at once
CHOICES = [" cat", " dog", " a mouse"]
QUESTIONS = [f"what animal is {name}" for name in ("tom", "rex", "jerry", "felix", "lassie", "mickey")]
ANSWERS = [0, 1, 2, 0, 1, 2]
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "local_writing": r"""
output_type: generate_until
doc_to_target: "{{written}}"
generation_kwargs: {until: ["e", "\n\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
    "local_beams": """
output_type: generate_until
doc_to_target: "{{written}}"
generation_kwargs: {num_beams: 4}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama whose template begins with BOS."""
    path = tmp_path_factory.mktemp("model") / "tiny-eval.gguf"
    return write_model(path, template="{{ bos_token }}" + TEMPLATE)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, dtype="float32", ctx_size=CONTEXT, max_num_seqs=32)


@pytest.fixture(scope="module")
def written(llm: LLM) -> list[str]:
    """What the model writes after each question, asked one by one."""
    params = SamplingParams(temperature=0, max_tokens=12, stop=("e", "\n\n"))
    return [llm.generate(question, params)[0].text for question in QUESTIONS]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, written: list[str]) -> Path:
    """A folder of tasks and their data. Of every other document, the answer is what the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {"question": q, "choices": CHOICES, "label": label, "written": text if i % 2 else "something else"}
        for i, (q, label, text) in enumerate(zip(QUESTIONS, ANSWERS, written, strict=True))
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    for name, facts in TASKS.items():
        data = f"{{data_files: {{test: {folder / 'data.jsonl'}}}, cache_dir: {folder / 'cache'}}}"
        common = f"task: {name}\ndataset_path: json\ndataset_kwargs: {data}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(common + 'doc_to_text: "{{question}}"' + facts)
    (folder / "broken.yaml").write_text("task: broken\ndataset_path: json\n" + TASKS["local_choice"])
    return folder


@pytest.fixture
def no_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval does not read its own 14,000 task files, and a task without files asks no hub for them."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.mark.slow
def test_the_command_reports_what_scores_and_answers_give(
    llm: LLM, tasks: Path, written: list[str], tmp_path: Path
) -> None:
    flags = ("--include-path", tasks, "--output-path", tmp_path, "--log_samples")
    done = realm("eval", "local_choice", "local_writing", "-m", llm.model.path, *FLOAT32, *flags)
    assert done.code == 0, done.err
    assert "local_choice" in done.out and "exact_match" in done.out
    results, samples = report(tmp_path)

    by_hand = [llm.score([question] * 3, CHOICES) for question in QUESTIONS]
    for sample, scores in zip(samples["local_choice"], by_hand, strict=True):
        said = [(float(logprob), greedy == "True") for ((logprob, greedy),) in sample["resps"]]
        assert said == [(score.total, score.is_greedy) for score in scores]
    best = [max(range(3), key=lambda i: scores[i].total) for scores in by_hand]
    accuracy = sum(a == b for a, b in zip(best, ANSWERS, strict=True)) / len(ANSWERS)
    assert results["results"]["local_choice"]["acc,none"] == accuracy
    assert 0 < accuracy < 1

    assert [sample["resps"] for sample in samples["local_writing"]] == [[[text]] for text in written]
    assert results["results"]["local_writing"]["exact_match,none"] == 0.5
    assert results["config"]["model_args"]["ctx_size"] == results["config"]["context"] == CONTEXT


def report(folder: Path) -> tuple[dict, dict[str, list[dict]]]:
    """What lm_eval wrote to --output_path: the results, and each task's samples in the documents' order."""
    (results,) = folder.rglob("results_*.json")
    samples = {}
    for name in ("local_choice", "local_writing"):
        for file in folder.rglob(f"samples_{name}_*.jsonl"):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            samples[name] = sorted(lines, key=lambda each: each["doc_id"])
    return json.loads(results.read_text()), samples


@pytest.mark.usefixtures("no_other_tasks")
def test_chat_templates_are_the_models(llm: LLM, tasks: Path, tmp_path: Path) -> None:
    flags = (
        "--include-path",
        tasks,
        "--output-path",
        tmp_path,
        "--log_samples",
        "--limit",
        2,
        "--num-fewshot",
        1,
    )
    chat = ("--apply-chat-template", "--system-instruction", "be kind")
    done = realm("eval", "local_choice", "-m", llm.model.path, *FLOAT32, *chat, *flags)
    assert done.code == 0, done.err
    results, samples = report(tmp_path)
    first, second = (sample["arguments"]["gen_args_0"]["arg_0"] for sample in samples["local_choice"])
    turns = rf"user: what animal is \w+\nassistant:  [a-z ]+\nuser: {QUESTIONS[0]}\n"
    assert re.fullmatch(rf"<s>system: be kind\n{turns}assistant: ", first)
    assert second.endswith(f"user: {QUESTIONS[1]}\nassistant: ")
    assert results["chat_template"] == llm.model.require_template().template


def test_python_gets_the_same(llm: LLM, tasks: Path) -> None:
    evaluate: Any = lm_eval.simple_evaluate
    manager = TaskManager(include_path=tasks, include_defaults=False)
    facts = {"tasks": ["local_choice"], "task_manager": manager, "bootstrap_iters": 0}
    scores = [llm.score([question] * 3, CHOICES) for question in QUESTIONS]
    options = f"dtype=float32,ctx_size={CONTEXT},max_num_seqs=32"
    for model in (
        {"model": RealmLM(llm)},
        {"model": "realm", "model_args": f"model={llm.model.path},{options}"},
    ):
        samples = evaluate(**model, **facts)["samples"]["local_choice"]
        expected = [[[(score.total, score.is_greedy)] for score in row] for row in scores]
        assert [each["resps"] for each in samples] == expected


@pytest.mark.parametrize(
    ("typed", "words", "code"),
    [
        ("", ["no task", "lm_eval ls tasks"], 2),
        ("nosuchtask", ["lm_eval: ", "nosuchtask"], 2),
        ("local_choice --bogus 1", ["--bogus", "realm eval --help"], 2),
        ("local_choice --num-fewshot many", ["num_fewshot", "many"], 2),
        ("local_choice --gen_kwargs warm", ["key=value", "warm"], 2),
        ("local_choice --metadata {x", ["Invalid JSON", "{x"], 2),
        ("local_choice --log_samples", ["lm_eval: ", "--output_path"], 2),
        ("local_choice -M hf", ["-M", "-m/--model"], 2),
        ("local_choice -a dtype=float32", ["--model_args", "--dtype"], 2),
        ("local_choice --batch_size auto", ["--batch_size", "auto"], 2),
        ("local_choice --include-path NOWHERE", ["--include-path", "NOWHERE"], 2),
        ("local_choice --memory much", ["--memory", "2.5G"], 2),
        ("local_choice -c 99999", ["99,999", "--ctx-size"], 2),
        ("local_beams", ["num_beams", "top_p"], 2),
        ("broken", ["lm_eval: "], 1),
    ],
)
@pytest.mark.usefixtures("no_other_tasks")
def test_errors_are_one_line(
    model: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: str,
    words: Sequence[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)  # a task without files looks for them in all of the working directory
    folder = () if "NOWHERE" in typed else ("--include-path", tasks)
    done = realm("eval", *typed.split(), "-m", model, *folder)
    for word in words:
        assert word in done.error, done.error
    assert done.error.startswith("lm_eval: ") == ("lm_eval: " in words)
    assert done.code == code


def test_without_lm_eval_the_error_names_the_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "realm_jax.evaluation")
    monkeypatch.delattr(realm_jax, "evaluation")
    done = realm("eval", "local_choice", "-m", model)
    assert "pip install 'realm-jax[eval]'" in done.error
    assert done.code == 1
