"""bench_8b measures what it says, tiny. Times are not tested."""

import json
import sys

import bench_8b
import pytest

pytestmark = pytest.mark.unoptimized

SIZES = {"layers": 1, "hidden": 64, "heads": 2, "kv-heads": 1, "ffn": 128, "vocab": 300}
LENGTHS = {"prompt": 64, "depth": 20, "tokens": 4, "batch": 1, "repeats": 1}


def test_a_tiny_8b(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    flags = [f"--{name}={value}" for name, value in (SIZES | LENGTHS).items()]
    monkeypatch.setattr(sys, "argv", ["bench_8b", "--kernels=xla", "--weights=int4", *flags])
    bench_8b.main()
    (form,) = json.loads(capsys.readouterr().out)["forms"]
    # 18 words for a unit of 128 inputs, of which these have one: qkv, out, gate and up, down, head; norms
    units = 128 + 64 + 256 + 64 + 300
    assert form["weight_bytes"] == 4 * (18 * units + 3 * 64)
    assert [(row["test"], row["batch"]) for row in form["rows"]] == [("pp64", 1), ("tg4", 1)]
    assert all(row["tokens_per_second"] > 0 < row["fraction"] for row in form["rows"])
