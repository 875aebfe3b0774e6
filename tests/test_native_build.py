"""The C++ code under sanitizers: no byte outside the buffers, no undefined arithmetic, no race."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "realm_jax" / "kernels" / "native"
FLAGS = ["-std=c++17", "-O0", "-g1", "-ffp-contract=off", "-fno-sanitize-recover=all"]
FLAGS += ["-fsanitize=address,undefined", "-Wall", "-Wextra", f"-I{SOURCES}"]
VECTORS = {  # the sources of a processor, and what its compiler has to be told
    "x86_64": ("avx*.cpp", []),
    "aarch64": ("neon.cpp", ["-march=armv8.2-a+dotprod"]),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver of all kernels, without XLA."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or platform.machine() not in VECTORS:
        pytest.skip(f"no C++ compiler for kernels of {platform.machine()}")
    pattern, flags = VECTORS[platform.machine()]
    folder = tmp_path_factory.mktemp("driver")
    sources = [TESTS / "native_sanitized.cpp", SOURCES / "tiling.cpp", *sorted(SOURCES.glob(pattern))]
    running = [
        subprocess.Popen(
            [compiler, *FLAGS, *flags, "-c", str(source), "-o", str(folder / f"{source.stem}.o")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source in sources
    ]
    for errors, process in [(process.communicate()[1], process) for process in running]:
        assert process.returncode == 0, errors[-3000:]
    objects = map(str, folder.glob("*.o"))
    subprocess.run([compiler, *FLAGS, *objects, "-o", str(folder / "driver")], check=True)
    return folder / "driver"


def test_kernels_stay_within_their_buffers_and_do_not_read_what_was_there(driver: Path):
    done = subprocess.run([driver, "60", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    assert done.stdout.count("60 cases") >= 1, done.stdout


def test_every_part_of_divided_work_runs_once(tmp_path: Path):
    """Under ThreadSanitizer, with callers at the same time and helpers that fall asleep."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=thread", "-Wall", "-Wextra", "-pthread", f"-I{SOURCES}"]
    program = tmp_path / "parallel"
    subprocess.run([compiler, *flags, str(TESTS / "native_parallel.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([program, "2000"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
