"""The measure of kernels runs where there is only a CPU, and what it writes is what kernels then use."""

import json
from pathlib import Path

import bench_attention
import bench_kernels
import bench_matmul
import pytest
from bench_attention import Shape
from bench_device import Device

from realm_jax.kernels.pallas import tuning


def test_interpreted_measures_say_so_and_the_table_written_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    table = tmp_path / "table.json"
    shape = bench_attention.INTERPRETED["decode"]
    monkeypatch.setattr(bench_attention, "INTERPRETED", {"decode": shape})
    bench_kernels.main(["--only", "attention", "--rounds", "1", "--write", "--table", str(table)])
    said = json.loads(capsys.readouterr().out)
    assert said["interpreted"] is True
    [row] = said["rows"]
    assert row["bound_microseconds"] is None
    assert all(row["microseconds"][who] > 0 for who in ("pallas", "xla", "reference"))
    [(bucket, sizes)] = json.loads(table.read_text())["cpu"]["attention_gpu"].items()
    monkeypatch.setenv(tuning.VARIABLE, str(table))
    assert tuning.sizes("attention_gpu", "cpu", bucket) == sizes


def test_a_candidate_with_wrong_results_is_not_chosen(monkeypatch: pytest.MonkeyPatch):
    shape = bench_attention.INTERPRETED["decode"]
    sizes = {"rows": 64, "positions": 64, "split": 0, "warps": 4, "stages": 1}
    target = tuning.Target("gpu", "cpu", interpret=True)
    monkeypatch.setattr(bench_attention.chosen, "attention", lambda q, *_, **__: q)
    q, rest = bench_attention._arrays(shape)
    where = Device(target, None, None)
    assert bench_attention._taken(sizes, shape, q, rest, q + 1, where, 1) == float("inf")
    assert bench_attention._taken(sizes, shape, q, rest, q, where, 1) < 60


def test_the_bound_is_what_must_be_read_or_multiplied():
    h200 = Device(tuning.Target("gpu", "NVIDIA H200", interpret=False), 4e12, 800e12)
    decode = Shape(2, 1, 1000, 4096, 32, 8, 128)
    read = 2 * 2 * 8 * 1000 * 128 * 2 + 2 * 4 * 2 * 32 * 128
    assert decode.bound(h200) == pytest.approx(read / 4e12)
    prefill = Shape(1, 2048, 2048, 4096, 32, 8, 128)
    assert prefill.bound(h200) == pytest.approx(4 * 32 * 128 * (2048 * 2049 // 2) / 800e12)
    assert Shape(1, 3, 1000, 4096, window=10).seen == 30
    assert Shape(1, 3, 1000, 4096, window=10).positions_read == 12


def test_every_product_has_a_row_and_its_sizes_are_tried():
    where = Device(tuning.Target("gpu", "cpu", interpret=True), 1e9, 1e12)
    rows = bench_matmul.measure(where, 1)
    assert [(row["type"], list(row["microseconds"])) for row in rows] == [
        ("BF16", ["xla"]),
        ("Q4_0", ["pallas", "xla"]),
    ]
    assert rows[0]["bound_microseconds"] == pytest.approx((2 * 48 * 64 + 4 * 4 * (48 + 64)) / 1e3, rel=1e-3)
    usual = tuning.sizes("matmul_gpu", "cpu", "few/bfloat16")
    times = bench_matmul._times(
        "Q4_0", bench_matmul.INTERPRETED, 4, [dict(usual), dict(usual) | {"outputs": 48}], where, 1
    )
    assert times[0] < 60
