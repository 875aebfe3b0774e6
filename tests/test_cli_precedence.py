"""Which source of a setting wins: flag, REALM_* variable, --config file, the model file's hint, default."""

import itertools
from pathlib import Path
from unittest import mock

import pytest
from command_line import Done, realm
from tiny import write_model

from realm_jax.errors import RequestError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams

pytestmark = pytest.mark.unoptimized

# name of the flag and in SamplingParams, the file's key, then values: default, hint, config, variable, flag
SAMPLING = [
    ("temperature", "temperature", "general.sampling.temp", (0.8, 0.5, 0.25, 0.75, 0.125)),
    ("top-k", "top_k", "general.sampling.top_k", (40, 11, 12, 13, 14)),
    ("top-p", "top_p", "general.sampling.top_p", (0.95, 0.5, 0.25, 0.75, 0.125)),
    ("min-p", "min_p", "general.sampling.min_p", (0.05, 0.5, 0.25, 0.75, 0.125)),
    (
        "repeat-penalty",
        "repetition_penalty",
        "general.sampling.penalty_repeat",
        (1.0, 1.5, 1.25, 1.75, 1.125),
    ),
]
SOURCES = ("hint", "config", "variable", "flag")  # by growing rank; the default is below all


class Asked(RequestError):
    """Stops a command where it would start to generate."""


def asked(*arguments: object, env: dict[str, str] | None = None) -> tuple[LLM, SamplingParams, Done]:
    """What the command would have run with."""
    seen = []

    def stream(llm: LLM, prompt: object, params: SamplingParams) -> None:
        seen.append((llm, params))
        raise Asked("stopped by the test")

    with mock.patch.object(LLM, "stream", stream):
        done = realm(*arguments, env=env)
    assert done.error == "stopped by the test", done
    return *seen[0], done


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model without hints and one with a hint for every parameter."""
    folder = tmp_path_factory.mktemp("hints")
    hints = {key: values[1] for _, _, key, values in SAMPLING}
    return {
        False: write_model(folder / "plain.gguf", layers=1),
        True: write_model(folder / "hints.gguf", layers=1, metadata=hints),
    }


@pytest.mark.parametrize("given", [*itertools.product((False, True), repeat=4)])
def test_the_source_of_highest_rank_wins(given: tuple[bool, ...], models: dict[bool, Path], tmp_path: Path):
    hint, config, variable, flag = given
    arguments: list[object] = ["generate", "-m", models[hint], "hi"]
    env = {}
    if config:
        file = tmp_path / "settings.toml"
        file.write_text("".join(f"{name} = {values[2]}\n" for name, _, _, values in SAMPLING))
        arguments += ["--config", file]
    for name, _, _, values in SAMPLING:
        if variable:
            env["REALM_" + name.replace("-", "_").upper()] = str(values[3])
        if flag:
            arguments += [f"--{name}", values[4]]
    _, params, _ = asked(*arguments, env=env)
    rank = max((i + 1 for i, is_given in enumerate(given) if is_given), default=0)
    assert {field: getattr(params, field) for _, field, _, _ in SAMPLING} == {
        field: values[rank] for _, field, _, values in SAMPLING
    }


@pytest.mark.parametrize("given", [*itertools.product((False, True), repeat=3)])
def test_settings_of_the_engine_rank_alike(given: tuple[bool, ...], models: dict[bool, Path], tmp_path: Path):
    config, variable, flag = given
    (tmp_path / "settings.toml").write_text("ctx-size = 256\ndtype = 'float32'\noffline = true\n")
    arguments = ["--config", tmp_path / "settings.toml"] if config else []
    env = {"REALM_CTX_SIZE": "512", "REALM_DTYPE": "bfloat16"} if variable else {}
    if flag:
        arguments += ["-c", 128, "--dtype", "auto"]
    llm, _, _ = asked("generate", "-m", models[False], "hi", *arguments, env=env)
    rank = max((i + 1 for i, is_given in enumerate(given) if is_given), default=0)
    assert llm.engine_config.ctx_size == (None, 256, 512, 128)[rank]
    assert llm.engine_config.dtype == ("auto", "float32", "bfloat16", "auto")[rank]
    assert llm.engine_config.offline == config


def test_a_file_sets_every_kind_of_flag(models: dict[bool, Path], tmp_path: Path):
    file = tmp_path / "settings.toml"
    file.write_text(
        f"model = '{models[False]}'\nstop = ['one', 'two words']\nsystem = 'Be brief.'\nseed = 7\n"
        "max_tokens = 5\nnum-samples = 2\njson = true\nlogprobs = 3\nprompt = 'hello'\n"
    )
    llm, params, _ = asked("generate", "--config", file)
    assert llm.model.path == models[False]
    assert (params.stop, params.seed, params.max_tokens) == (("one", "two words"), 7, 5)
    assert (params.n, params.logprobs) == (2, 3)


def test_a_file_may_hold_one_stop_string(models: dict[bool, Path], tmp_path: Path):
    (tmp_path / "settings.toml").write_text("stop = 'abc'")
    _, params, _ = asked("generate", "-m", models[False], "hi", "--config", tmp_path / "settings.toml")
    assert params.stop == ("abc",)


def test_one_file_serves_all_commands(models: dict[bool, Path], tmp_path: Path):
    """Flags of other commands in it are no error, so that REALM_CONFIG can name it once and for all."""
    (tmp_path / "settings.toml").write_text(f"model = '{models[False]}'\nlogprobs = 3\njson = true\n")
    done = realm("tokenize", "hi", "--count", env={"REALM_CONFIG": str(tmp_path / "settings.toml")})
    assert done.code == 0 and done.out.strip().isdigit()


def test_stops_and_the_model_come_from_variables(models: dict[bool, Path]):
    _, params, _ = asked("generate", "hi", env={"REALM_MODEL": str(models[True]), "REALM_STOP": "one two"})
    assert params.stop == ("one", "two") and params.top_k == 11


def test_memory_is_a_size(models: dict[bool, Path]):
    for text, size in {"100M": 10**8, "2.5G": 25 * 10**8, "0.5gb": 5 * 10**8, "90000000": 9 * 10**7}.items():
        llm, _, _ = asked("generate", "-m", models[False], "hi", "--memory", text)
        assert llm.engine_config.memory == size
