"""Laws of a mesh: those of `on_four_devices`, of two processes, and of the flags."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, Done, realm, start

FLAGS = (
    "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
SMALL = ("-c", 64, "--dtype", "float32", "--deterministic", "--raw", "-n", 8)


def test_laws_of_four_devices(fixtures: Path):
    """In a process of its own, because JAX counts its devices once."""
    tests = [sys.executable, "-m", "pytest", "-p", "no:xdist", "tests/on_four_devices.py"]
    env = os.environ | {"XLA_FLAGS": FLAGS.format(4)}
    done = subprocess.run(tests, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"\b[1-9][0-9]+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout


@pytest.mark.unoptimized
def test_two_processes_generate_what_one_does_and_the_first_prints_it(tiny_model: Path):
    """Also without a seed: all take the one that the first process chose, or their tokens would part."""
    asked = ("generate", "hello world this is", "-m", tiny_model, *SMALL, "--json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    together = ("--mesh", "tp=4", "--coordinator", address, "--num-processes", 2, "--process-id")
    env = {"XLA_FLAGS": FLAGS.format(2)}
    sampled = (*asked, "--temperature", 1, "--spec-type", "ngram")
    running = [start(*sampled, *together, i, env=env) for i in range(2)]
    first, second = (_done(process) for process in running)
    assert first.code == 0 and second.code == 0, first.err + second.err
    assert second.out == ""
    found = json.loads(first.out)
    alone = realm(*asked, "--temperature", 1, "--seed", found["seed"])
    assert json.loads(alone.out)["token_ids"] == found["token_ids"]


def _done(process: subprocess.Popen) -> Done:
    out, err = process.communicate(timeout=300)
    return Done(process.returncode, out.decode(), err.decode(), 0.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--mesh", "four"), "mesh is 'four'; it must be tp=N"),
        (("--mesh", "tp=2"), "JAX sees 1 cpu device (lower it"),
        (("--mesh", "tp=2", "--coordinator", "a:1"), "go together; give all three"),
        (("--distributed", "auto"), "several processes need --mesh tp=N"),
        (("--mesh", "tp=2", "--distributed", "auto", "--process-id", 0), "leave one of both out"),
    ],
)
def test_flags_that_cannot_be_are_refused(tiny_model: Path, flags: tuple[object, ...], words: str):
    assert words in realm("generate", "hello", "-m", tiny_model, *SMALL, *flags).error


def test_several_processes_do_not_resume(tiny_model: Path, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    job = ("batch", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-m", tiny_model, "--resume")
    assert "--resume is for one process" in realm(*job, "--coordinator", "a:1").error
