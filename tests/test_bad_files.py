"""Every broken or hostile file ends the command line in one line: a law over all of fixtures/bad."""

import json
from pathlib import Path

import pytest
from command_line import realm, spawn

pytestmark = pytest.mark.unoptimized

COMMANDS = {
    "generate": lambda file: ("generate", "-m", file, "--raw", "hello", "-n", 4),
    "inspect": lambda file: ("inspect", file),
}
QUICK_S = 5.0  # a busy machine included; the parser's own tests hold it to much less


@pytest.fixture(scope="module")
def bad(fixtures: Path) -> Path:
    return fixtures / "bad"


@pytest.fixture(scope="module")
def cases(bad: Path) -> dict[str, str]:
    """File -> what must become of it."""
    listed = {case["file"]: case["expected"] for case in json.loads((bad / "cases.json").read_text())}
    assert {file.name for file in bad.glob("*.gguf")} == {*listed, "control-good.gguf"}
    return listed


def test_the_good_file_generates_and_is_described(bad: Path):
    done = realm(*COMMANDS["generate"](bad / "control-good.gguf"))
    assert done.code == 0 and done.out
    assert realm(*COMMANDS["inspect"](bad / "control-good.gguf")).code == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_every_file_that_must_fail_ends_in_one_line(bad: Path, cases: dict[str, str], command: str):
    failing = [file for file, expected in cases.items() if expected == "must_fail"]
    assert len(failing) > 30
    for file in failing:
        done = realm(*COMMANDS[command](bad / file))
        assert done.error.startswith(f"{file}: "), done.error
        assert len(done.err.splitlines()) == 1, done.err
        assert done.seconds < QUICK_S, file


def test_a_file_that_may_load_fails_cleanly_or_works(bad: Path, cases: dict[str, str]):
    for file in (file for file, expected in cases.items() if expected == "may_load"):
        done = realm(*COMMANDS["generate"](bad / file))
        assert done.code == 0 or done.error


@pytest.mark.slow
def test_a_hostile_template_ends_in_one_line_or_within_bounds(bad: Path, cases: dict[str, str]):
    hostile = [file for file, expected in cases.items() if expected == "template"]
    assert hostile
    for file in hostile:
        done = realm("generate", "-m", bad / file, "hello", "-n", 4)
        assert done.code == 0 or done.error
        assert done.seconds < 10, file
        assert realm("inspect", bad / file).code == 0  # describing a file runs nothing of it


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["empty.gguf", "cut-in-data.gguf", "dims-product-overflow.gguf", "string-length-2e63.gguf"]
)
def test_a_process_of_its_own_says_the_same(bad: Path, file: str):
    command = COMMANDS["generate"](bad / file)
    alone, inside = spawn(*command), realm(*command)
    assert (alone.code, alone.error) == (inside.code, inside.error)
