"""Every user error: one line, exit code 1 or 2, nothing on stdout, no traceback."""

from pathlib import Path
from unittest import mock

import jax
import pytest
from command_line import realm, spawn
from tiny import write_model

# what is typed after `realm`; what the one line must name. MODEL, FILE etc. are replaced.
USAGE = [
    ("", ["Missing command", "--help"]),
    ("nosuchcommand", ["nosuchcommand"]),
    ("--bogus", ["--bogus"]),
    ("models", ["Missing command"]),
    ("models nosuch", ["nosuch"]),
    ("generate -m MODEL", ["prompt", "e.g."]),
    ("generate -m MODEL one -p two", ["prompt once"]),
    ("generate -m MODEL one -f FILE", ["prompt once"]),
    ("generate -m MODEL one two", ["two"]),
    ("generate -m MODEL EMPTY", ["prompt is empty"]),
    ("generate -m MODEL --raw EMPTY", ["prompt is empty"]),
    ("generate -m MODEL -", ["prompt is empty"]),
    ("generate -m MODEL -f MISSING", ["--file", "No such file"]),
    ("generate -m MODEL -f FOLDER", ["--file", "directory"]),
    ("generate -m MODEL -f BINARY", ["--file", "UTF-8"]),
    ("generate -m MODEL hi -j MISSING", ["--json-schema", "No such file"]),
    ("generate -m MODEL hi --regex (a", ["regex cannot be used", "unclosed group"]),
    ("generate -m MODEL hi --regex a --json-object", ["--json-object and --regex", "give one"]),
    ("generate -m MODEL hi --bogus", ["--bogus", "--help"]),
    ("generate -m MODEL hi -n many", ["many"]),
    ("generate -m MODEL hi -n 1.5", ["1.5"]),
    ("generate -m MODEL hi -n -1", ["max_tokens is -1"]),
    ("generate -m MODEL hi -n", ["-n"]),
    ("generate -m MODEL hi --temperature hot", ["hot"]),
    ("generate -m MODEL hi --temperature -1", ["temperature is -1"]),
    ("generate -m MODEL hi --temperature nan", ["temperature is nan"]),
    ("generate -m MODEL hi --top-p 0", ["top_p is 0"]),
    ("generate -m MODEL hi --top-p 1.1", ["top_p is 1.1"]),
    ("generate -m MODEL hi --top-k -2", ["top_k is -2"]),
    ("generate -m MODEL hi --min-p 2", ["min_p is 2"]),
    ("generate -m MODEL hi --repeat-penalty 0", ["repetition_penalty is 0"]),
    ("generate -m MODEL hi --presence-penalty 3", ["presence_penalty is 3"]),
    ("generate -m MODEL hi --frequency-penalty -3", ["frequency_penalty is -3"]),
    ("generate -m MODEL hi --seed -1", ["seed is -1"]),
    ("generate -m MODEL hi --seed 99999999999999999999", ["seed is 99999999999999999999"]),
    ("generate -m MODEL hi --stop EMPTY", ["stop"]),
    ("generate -m MODEL hi --num-samples 0", ["n is 0"]),
    ("generate -m MODEL hi --logprobs 2", ["--json"]),
    ("generate -m MODEL hi --json --logprobs 21", ["logprobs is 21"]),
    ("generate -m MODEL hi --raw --system sys", ["--raw"]),
    ("generate -m MODEL hi -c 0", ["ctx_size is 0"]),
    ("generate -m MODEL hi -c 99999", ["99,999", "2,048", "--ctx-size"]),
    ("generate -m MODEL LONG", ["2,048", "--ctx-size"]),
    ("generate -m MODEL LONG -c 64", ["64", "--ctx-size"]),
    ("generate -m MODEL hi -t 0", ["threads is 0"]),
    ("generate -m MODEL hi --device abacus", ["abacus"]),
    ("generate -m MODEL hi --dtype int3", ["int3"]),
    ("generate -m MODEL hi --weights none", ["none"]),
    ("generate -m MODEL hi --memory much", ["--memory", "2.5G"]),
    ("generate -m MODEL hi --memory -1", ["--memory"]),
    ("generate -m MODEL hi --config MISSING", ["--config", "No such file"]),
    ("generate -m MODEL hi --config BINARY", ["--config"]),
    ("generate -m MODEL hi --config BAD_TOML", ["--config", "line 1"]),
    ("generate -m MODEL hi --config UNKNOWN_KEY", ["--config", "warmth"]),
    ("generate -m MODEL hi --config WRONG_TYPE", ["--config", "temperature"]),
    ("generate -m MODEL hi --config TRUE_NUMBER", ["--temperature", "'True' (from --config)"]),
    ("generate -m MODEL hi --config ROUNDED", ["--max-tokens", "1.5"]),
    ("generate -m nosuchmodel hi", ["nosuchmodel"]),
    ("generate -m MISSING hi", ["missing.gguf"]),
    ("generate -m FOLDER hi", ["folder"]),
    ("generate -m hf:nobody hi", ["hf:nobody"]),
    ("chat -m nosuchmodel", ["nosuchmodel"]),
    ("tokenize", ["TEXT"]),
    ("tokenize -m MODEL hi --ids --count", ["--ids", "--count"]),
    ("tokenize -m nosuchmodel hi", ["nosuchmodel"]),
    ("inspect nosuchmodel", ["nosuchmodel"]),
    ("inspect MISSING", ["missing.gguf"]),
    ("models pull nosuchmodel", ["nosuchmodel"]),
    ("models path nosuchmodel", ["nosuchmodel"]),
    ("doctor --ctx-size 0", ["ctx_size is 0"]),
]
FAILURES = [
    ("generate hi --offline", ["offline", "SmolLM2-135M-Instruct.Q4_1.gguf"]),
    ("generate -m hf:nobody/nothing/model.gguf hi --offline", ["offline", "model.gguf"]),
    ("models path", ["SmolLM2-135M-Instruct.Q4_1.gguf"]),
    ("models pull --offline", ["offline"]),
    ("tokenize hi --offline", ["offline"]),
    ("inspect --offline", ["offline"]),
    ("generate -m MODEL hi --memory 100k", ["memory is 0.1 MB", "--ctx-size"]),
    ("generate -m FILE hi", ["prompt.txt", "GGUF"]),
    ("generate -m NO_TEMPLATE hi --system sys", ["no chat template", "--raw"]),
    ("chat -m NO_TEMPLATE", ["no chat template", "--raw"]),
    ("generate -m BAD_HINT hi", ["general.sampling.top_p", "7"]),
    ("generate -m TEXT_HINT hi", ["general.sampling.temp", "hot"]),
]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, str]:
    """What the words in capitals above stand for."""
    folder = tmp_path_factory.mktemp("errors")
    files = {
        "FILE": ("prompt.txt", b"Once upon a time"),
        "BINARY": ("binary.txt", b"\xff\xfe\x00"),
        "BAD_TOML": ("bad.toml", b"temperature = = 1"),
        "UNKNOWN_KEY": ("unknown.toml", b"warmth = 1"),
        "WRONG_TYPE": ("type.toml", b"temperature = {celsius = 20}"),
        "TRUE_NUMBER": ("true.toml", b"temperature = true"),
        "ROUNDED": ("rounded.toml", b"max-tokens = 1.5"),
    }
    for name, content in files.values():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    models = {
        "NO_TEMPLATE": write_model(folder / "no-template.gguf", template=None),
        "BAD_HINT": write_model(folder / "bad-hint.gguf", metadata={"general.sampling.top_p": 7.0}),
        "TEXT_HINT": write_model(folder / "text-hint.gguf", metadata={"general.sampling.temp": "hot"}),
        "MODEL": tiny_model,
        "MISSING": folder / "missing.gguf",
        "FOLDER": folder / "folder",
    }
    paths = {word: str(path) for word, path in models.items()}
    return paths | {word: str(folder / name) for word, (name, _) in files.items()} | {"EMPTY": ""}


def typed(line: str, things: dict[str, str]) -> list[str]:
    return [things.get(word, word).replace("LONG", "hello " * 1000) for word in line.split()]


@pytest.mark.parametrize(("line", "named"), USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(
    line: str, named: list[str], things: dict[str, str], tmp_path: Path
):
    done = realm(*typed(line, things), env={"REALM_CACHE": str(tmp_path)})
    assert all(part in done.error for part in named), done.error
    assert done.code == 2


@pytest.mark.parametrize(("line", "named"), FAILURES)
def test_what_fails_is_one_line_and_exit_code_1(
    line: str, named: list[str], things: dict[str, str], tmp_path: Path
):
    done = realm(*typed(line, things), env={"REALM_CACHE": str(tmp_path)})
    assert all(part in done.error for part in named), done.error
    assert done.code == 1


@pytest.mark.parametrize(
    ("raised", "named"),
    [(RuntimeError("no libtpu\nmore"), "no libtpu"), (AssertionError(), "JAX sees no such device")],
)
def test_a_device_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, named: str
):
    """JAX asserts, without a word, where it may use CUDA alone and there is no GPU."""
    monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=raised))
    assert realm("doctor").error.endswith(f"device 'auto' is not available: {named}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("generate", b"\xff\xfe"), ("tokenize", b"\xff\xfe"), ("generate", "hi", "--device", "tpu")]
)
def test_what_only_a_process_of_its_own_can_show(arguments: tuple[str | bytes, ...], tiny_model: Path):
    done = spawn(*arguments, "-m", tiny_model)
    assert done.error and done.code == 2


@pytest.mark.parametrize("command", [("generate", "-"), ("tokenize", "-")])
def test_stdin_that_is_no_text(command: tuple[str, str], tiny_model: Path):
    assert "stdin is not UTF-8" in realm(*command, "-m", tiny_model, stdin=b"\xff\xfe").error


@pytest.mark.parametrize("how", [{"flag": ["--verbose"]}, {"env": {"REALM_VERBOSE": "1"}}])
def test_verbose_shows_where_an_error_came_from(how: dict, tiny_model: Path):
    arguments = ["generate", "-m", tiny_model, "hi", "--temperature", "-1"]
    done = realm(*arguments, *how.get("flag", ()), env=how.get("env"))
    assert done.code == 2 and done.out == ""
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: temperature is -1")
    assert "Traceback" not in realm(*arguments).err


def test_an_error_in_a_variable_is_one_line_too(tiny_model: Path):
    done = realm("generate", "-m", tiny_model, "hi", env={"REALM_TEMPERATURE": "hot"})
    assert "'hot' (from REALM_TEMPERATURE)" in done.error and done.code == 2
