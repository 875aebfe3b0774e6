"""A batch job answers every line once, as generate would, however often it is killed and resumed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from realm_jax import LLM, RequestError, SamplingParams
from realm_jax.serving.batch import BatchJob, read_lines

pytestmark = pytest.mark.unoptimized

rng = random.Random(0)
KILLS = int(os.environ.get("REALM_KILLS", "3"))  # more of them take a minute or two


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(
        tiny_model, max_num_seqs=8, ctx_size=1024, max_num_batched_tokens=256
    )  # as in test_batching.py


def write_lines(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows), "an id stands twice"
    return {row["custom_id"]: row for row in rows}


def some_lines(count: int = 24) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for i in range(count):
        text = " ".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 120)))
        sampling = {"max_tokens": rng.randint(1, 12), "temperature": rng.choice([0, 0.7, 1])}
        body = {"messages": [{"role": "user", "content": text}], **sampling}
        lines.append(
            [
                {"id": f"short-{i}", "prompt": text, **sampling},
                {"id": f"talk-{i}", **body},
                {"custom_id": f"chat-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body},
            ][i % 3]
        )
    return lines


BAD = [
    "no json",
    "[1, 2]",
    '{"id": "no-prompt"}',
    {"id": "hot", "prompt": "a", "temperature": -1},
    {"id": "odd", "prompt": "a", "surprise": 1},
    {"id": "long", "prompt": "a " * 1200},
    {"id": "kind", "prompt": {"a": 1}},
    {"id": "empty", "prompt": []},
    {"custom_id": "where", "method": "POST", "url": "/v1/images", "body": {}},
    {"id": "talk", "messages": [{"role": "user"}]},
    {"id": "token", "prompt": [99999]},
    "[" * 5000,
]


def test_a_job_says_what_generate_says(llm: LLM, tmp_path: Path) -> None:
    lines = [
        {"id": "a", "prompt": "one two", "max_tokens": 5, "temperature": 0, "logprobs": 2},
        {"id": "b", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 7, "seed": 3, "n": 2},
    ]
    BatchJob(llm, write_lines(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl").run()
    rows = read_rows(tmp_path / "out.jsonl")
    first = llm.generate("one two", SamplingParams(max_tokens=5, temperature=0, logprobs=2))[0]
    body = rows["a"]["response"]["body"]
    assert body["choices"][0]["text"] == first.text
    assert first.logprobs is not None
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [each["logprob"] for each in first.logprobs]
    assert body["usage"] == {
        "prompt_tokens": first.usage.prompt_tokens,
        "completion_tokens": 5,
        "total_tokens": first.usage.prompt_tokens + 5,
    }
    ids = llm.chat_prompt(lines[1]["messages"])
    both = llm.generate([ids], SamplingParams(max_tokens=7, seed=3, n=2))
    choices = rows["b"]["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == [output.text for output in both]


def test_bad_lines_become_error_lines_and_harm_nobody(llm: LLM, tmp_path: Path) -> None:
    good = some_lines(6)
    mixed = [*good[:3], *BAD, *good[3:], {"id": good[0]["id"], "prompt": "again"}]
    BatchJob(llm, write_lines(tmp_path / "in.jsonl", mixed), tmp_path / "out.jsonl").run()
    rows = read_rows(tmp_path / "out.jsonl")
    assert len(rows) == len(mixed)
    BatchJob(llm, write_lines(tmp_path / "good.jsonl", good), tmp_path / "alone.jsonl").run()
    alone = read_rows(tmp_path / "alone.jsonl")
    assert {key: rows[key] for key in alone} == alone
    for row in rows.values():
        if row["custom_id"] not in alone:
            assert row["response"] is None and "\n" not in row["error"]["message"]
    assert "temperature is -1" in rows["hot"]["error"]["message"]
    assert "the context is 1,024" in rows["long"]["error"]["message"]
    assert "surprise" in rows["odd"]["error"]["message"]


def test_shards_together_are_the_whole(llm: LLM, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", some_lines(10))
    BatchJob(llm, source, tmp_path / "whole.jsonl").run()
    parts: dict[str, Any] = {}
    for index in (1, 2, 3):
        BatchJob(llm, source, tmp_path / f"{index}.jsonl", shard=(index, 3)).run()
        part = read_rows(tmp_path / f"{index}.jsonl")
        assert not parts.keys() & part.keys()
        parts |= part
    assert parts == read_rows(tmp_path / "whole.jsonl")


def test_resume_mends_a_torn_line(llm: LLM, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", some_lines(9)), tmp_path / "out.jsonl"
    BatchJob(llm, source, target).run()
    whole, data = read_rows(target), target.read_bytes()
    for cut in [0, 1, 50, len(data) // 2, len(data) - 2, len(data)]:
        target.write_bytes(data[:cut])
        BatchJob(llm, source, target).run(resume=True)
        assert read_rows(target) == whole


def test_order_and_retry(llm: LLM, tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl", [*some_lines(6), {"id": "hot", "prompt": "a", "temperature": -1}]
    )
    target = tmp_path / "out.jsonl"
    job = BatchJob(llm, source, target)
    job.run()
    job.order_output()
    order = [line.custom_id for line in read_lines(source, (1, 1))]
    assert list(read_rows(target)) == order
    before = read_rows(target)
    assert job.run(resume=True).done == 7
    assert job.run(resume=True, retry_errors=True).errors == 1
    assert read_rows(target) == before


def test_another_jobs_output_is_refused(llm: LLM, tmp_path: Path) -> None:
    source, target = write_lines(tmp_path / "in.jsonl", some_lines(3)), tmp_path / "out.jsonl"
    BatchJob(llm, source, target).run()
    with pytest.raises(RequestError, match="exists"):
        BatchJob(llm, source, target).run()
    with pytest.raises(RequestError, match="made with seed 0, this job has 1"):
        BatchJob(llm, source, target, seed=1).run(resume=True)
    other = write_lines(tmp_path / "other.jsonl", some_lines(3))
    with pytest.raises(RequestError, match="input_sha256"):
        BatchJob(llm, other, target).run(resume=True)


@pytest.mark.slow
def test_kill_9_at_random_moments(llm: LLM, tiny_model: Path, tmp_path: Path) -> None:
    lines = [{**line, "max_tokens": 60, "ignore_eos": True} for line in some_lines(120) if "id" in line]
    source = write_lines(tmp_path / "in.jsonl", lines)
    BatchJob(llm, source, tmp_path / "whole.jsonl").run()
    whole, target = read_rows(tmp_path / "whole.jsonl"), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "realm_jax", "batch", str(source), "-o", str(target), "--resume"]
    command += ["-m", str(tiny_model), "--ctx-size", "1024", "--max-num-seqs", "8"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for kill in range(KILLS):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
        have = len(target.read_bytes()) if target.exists() else 0
        while process.poll() is None and (not target.exists() or len(target.read_bytes()) == have):
            time.sleep(0.002)
        time.sleep(rng.random() * 0.02)
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
        assert process.returncode == -signal.SIGKILL, (kill, said)
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    assert read_rows(target) == whole
