"""bench_cpu measures what it says, with and without a peer; its random models load. Times are not tested."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_cpu
import bench_models
import bench_profile
import bench_report
import bench_rows
import numpy as np
import pytest
from bench_hlo import Instruction, read_program
from bench_workers import Worker, WorkerError
from gguf.constants import GGMLQuantizationType
from tiny import VOCAB, write_model

from realm_jax import LLM, RequestError, gguf, quant

pytestmark = pytest.mark.unoptimized

ROOT = Path(__file__).parents[1]
SHAPE = bench_models.Shape(hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, vocab=VOCAB, context=256)
CONTEXT = 192  # everything below has this length, rounded up: the programs are compiled once for all
SMALL = ("--prefill", "130", "--depth", "40", "--batch", "2", "-n", "100", "--rounds", "1")


def run_bench(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """How bench_cpu ends where llama_cpp cannot be imported."""
    (folder / "llama_cpp.py").write_text("raise ImportError")
    paths = os.pathsep.join((str(folder), str(ROOT)))
    return subprocess.run(
        [sys.executable, ROOT / "tests" / "bench_cpu.py", *SMALL, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )


def test_both_modes_run_to_the_end_without_a_peer(tmp_path: Path):
    model = write_model(tmp_path / "tiny.gguf", layers=1, context=CONTEXT)
    table = run_bench(tmp_path, "--models", model, "--engine-config", "weights=dense")
    assert table.returncode == 0, table.stderr
    check_table(json.loads(table.stdout), table.stderr, str(model), tmp_path)
    profile = run_bench(tmp_path, "--models", model, "--profile")
    assert profile.returncode == 0, profile.stderr
    check_profile(json.loads(profile.stdout)["rows"], profile.stderr)


def check_table(found: dict[str, Any], err: str, model: str, folder: Path) -> None:
    """Every test has its row, of ours alone; the plot and the table have them too."""
    assert "only realm_jax is measured" in err
    assert not found["failed"]
    rows = found["rows"]
    assert [row["test"] for row in rows] == ["process", "process", *bench_rows.TESTS[:-1]]
    assert all(row["model"] == model and row["rounds"] == 1 and row["realm_jax"] > 0 for row in rows)
    assert not any("ratio" in row or "llama_cpp" in row for row in rows)
    assert rows[0]["generated"] == {"realm_jax": 32}
    assert 50 < rows[1]["realm_jax"] < 4000  # MB
    for flags in found["flags"][model].values():
        assert flags["realm_jax"]["weights"] == "dense" and flags["realm_jax"]["resolved"]
    lines = bench_report.markdown(rows).splitlines()
    assert len(lines) == 2 + len(rows) and model in lines[0]
    bench_report.draw(rows, folder / "plot.png")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")


def check_profile(rows: list[dict[str, Any]], err: str) -> None:
    """The parts of a call make up its time."""
    assert [row["call"] for row in rows] == ["prefill", "decode"]
    for row in rows:
        assert tuple(row["parts"]) == bench_profile.PARTS
        assert sum(row["parts"].values()) == pytest.approx(row["milliseconds"], rel=0.01, abs=0.01)
        assert row["parts"]["matmul"] > 0 and row["parts"]["attention"] > 0
        assert row["parts"]["other"] < 0.3 * row["milliseconds"]
    assert "| norm and elementwise |" in err


CHILD = """
import os
from bench_workers import serve
class Child:
    def add(self, a, b):
        print("not an answer")
        return a + b
    def fail(self):
        raise SystemExit("too many; lower it")
    def die(self):
        os._exit(7)
serve(Child())
"""


def test_workers_answer_fail_and_die(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"))
    worker = Worker("ours", [sys.executable, "-c", CHILD])
    assert worker.ask("add", a=1, b=2) == 3
    with pytest.raises(WorkerError, match="ours: SystemExit: too many; lower it"):
        worker.ask("fail")
    assert worker.ask("add", a=3, b=2) == 5
    with pytest.raises(WorkerError, match="ours died with exit code 7 in die"):
        worker.ask("die")
    assert worker.ask("add", a=1, b=1) == 2  # by a new one
    worker.close()


class Answers(Worker):
    """Says what a worker would, at once: llama.cpp takes twice as long, and knows another model."""

    def ask(self, task: str, **arguments: Any) -> Any:
        slow = 2.0 if self.name == "llama_cpp" else 1.0
        match task:
            case "prepare":
                return {"path": str(bench_models.model_file(arguments["name"]))}
            case "draw":
                return [[5] * arguments["length"]] * arguments["count"]
            case "logits":
                return [1.0, 2.0, 3.0] if slow == 1 or self.agrees else [2.0, 1.0, 3.0]
            case "decode":
                return {"tokens": 8, "seconds": slow}
            case "load" | "prefill":
                return slow
        return None

    agrees = True


def run_with_answers(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr(bench_cpu, "Worker", Answers)
    tests = ("--tests", "load,prefill,ttft,decode", "--rounds", "1", "--prefill", "100")
    options = bench_cpu.parser().parse_args([*tests, "--batch", "4", "--depth", "70", *arguments])
    return bench_cpu.run_models(options, "python")


def test_rows_have_both_sides_and_a_model_that_fails_is_named(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    def prepared(sides: bench_rows.Sides, name: str) -> dict[str, Any]:
        if name == "nosuch":
            raise WorkerError("no such model")
        return {"path": str(tiny_model)}

    monkeypatch.setattr(bench_cpu, "prepared", prepared)
    found = run_with_answers(monkeypatch, "--models", "nosuch,tiny")
    assert found["failed"] == {"nosuch": "no such model"}
    assert {row["model"] for row in found["rows"]} == {"tiny"}
    assert [row["ratio"] for row in found["rows"]] == [2] * 4
    speeds = {row["test"]: (row["realm_jax"], row["llama_cpp"]) for row in found["rows"]}
    size = float(f"{tiny_model.stat().st_size / 1e6:.4g}")
    assert speeds == {
        "load": (size, pytest.approx(size / 2, rel=1e-3)),
        "prefill": (100, 50),
        "ttft": (1000, 2000),
        "decode": (8, 4),
    }
    assert found["logit_correlation"] == {"tiny": 1}


def test_sides_that_do_not_compute_the_same_are_not_measured(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Answers, "agrees", False)
    found = run_with_answers(monkeypatch, "--models", str(tiny_model))
    assert "not the same model" in found["failed"][str(tiny_model)]
    assert [row["test"] for row in found["rows"]] == ["load"]


def event(start: float, end: float, origin: str, opcode: str = "fusion", run: int = 0) -> bench_profile.Event:
    instruction = Instruction(opcode, origin, origin)
    return bench_profile.Event(start, end, "an operation", ("jit_step", run), instruction)


def test_operations_share_the_time_in_which_they_run():
    events = [
        event(0, 100, "while", "while"),
        event(10, 30, "realm_matmul"),
        event(20, 30, "realm_attention"),
        event(20, 30, "realm_attention"),
        event(100, 110, "realm_rms_norm"),
        event(150, 170, "jit(step)/Transformer.logits/dot_general", run=1),
    ]
    spent = bench_profile._shares(events, 0, 160)
    assert sum(spent.values()) == 160
    assert spent["matmul"] == pytest.approx(10 + 10 / 3 + 10)
    assert spent["attention"] == pytest.approx(20 / 3)
    assert spent["norm and elementwise"] == 10
    assert spent["dispatch"] == 80  # a loop in which nothing runs
    assert spent["host"] == 40


def test_a_fusion_is_known_by_the_functions_it_was_traced_in():
    program = read_program(
        """HloModule jit_step
FunctionNames
1 "Linear.__call__"
2 "KVCache.write"

FileLocations
1 {file_name_id=1 function_name_id=2 line=1}
2 {file_name_id=1 function_name_id=1 line=1}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}

%fused (p: f32[4]) -> f32[4] {
  ROOT %a = f32[4]{0} add(%p, %p), metadata={op_name="jit(step)/add" stack_frame_id=2}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%fused
  %c = (f32[4]{0}, s32[4]{0}) custom-call(%f), custom_call_target="realm_attention"
  ROOT %w = f32[4]{0} while(%c), body=%fused
}
"""
    )
    assert program["f"] == Instruction(
        "fusion", "jit(step)/add", "jit(step)/add KVCache.write Linear.__call__"
    )
    assert program["w"].opcode == "while" and bench_profile.part_of(program["w"]) == bench_profile.OTHER
    assert bench_profile.part_of(program["c"]) == "attention"


def test_ratios_are_medians_of_rounds():
    took = [
        {"realm_jax": ours, "llama_cpp": theirs} for ours, theirs in ((1.0, 3.0), (2.0, 2.0), (4.0, 20.0))
    ]
    row = bench_rows._row("decode", "tokens/s", took, lambda seconds: 12 / seconds, sequences=4)
    assert row == {
        **{"test": "decode", "sequences": 4, "unit": "tokens/s", "rounds": 3},
        **{"realm_jax": 6, "llama_cpp": 4, "ratio": 3},
    }


def test_a_slow_row_has_fewer_rounds():
    options: Any = SimpleNamespace(rounds=5, row_seconds=0)
    assert bench_rows._rounds(options, lambda: {"realm_jax": 1.0}) == [{"realm_jax": 1.0}]
    options.row_seconds = 60
    assert len(bench_rows._rounds(options, lambda: {"realm_jax": 1.0})) == 5


@pytest.mark.parametrize("vocab", [300, VOCAB, 400])
@pytest.mark.parametrize("ggml_type", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0])
def test_random_models_compute_finite_numbers(
    tiny_model: Path, tmp_path: Path, vocab: int, ggml_type: GGMLQuantizationType
):
    path = tmp_path / "random.gguf"
    bench_models.write_random_model(path, replace(SHAPE, vocab=vocab), ggml_type, tokenizer_of=tiny_model)
    assert list(tmp_path.iterdir()) == [path]
    with gguf.open(path) as file:
        for name in ("token_embd.weight", "blk.1.ffn_down.weight"):
            info = file.tensors[name]
            assert info.ggml_type == ggml_type
            weight = np.asarray(quant.dequantize(file.data(name), info.ggml_type, info.shape))
            assert weight.std() * weight.shape[1] ** 0.5 == pytest.approx(1, abs=0.05)
    llm = LLM(path, dtype="float32")
    logits = llm.logits(list(range(100, 110)))
    assert logits.shape == (10, vocab) and np.isfinite(logits).all() and 0.1 < logits.std() < 10
    assert llm.tokenizer.decode(llm.tokenizer.encode("a b"), skip_special=True).strip() == "a b"


def test_an_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match=r"unknown model nosuch; known: q4_1, .*8b_q4_0"):
        bench_models.model_file("nosuch")


def test_types_that_cannot_be_written_are_refused(tiny_model: Path, tmp_path: Path):
    for ggml_type, words in ((GGMLQuantizationType.Q4_K, "Q4_K"), (GGMLQuantizationType.IQ4_NL, "IQ4_NL")):
        shape = replace(SHAPE, hidden=256, ffn=512)
        with pytest.raises(RequestError, match=words):
            bench_models.write_random_model(
                tmp_path / "random.gguf", shape, ggml_type, tokenizer_of=tiny_model
            )
    assert not (tmp_path / "random.gguf").exists()
