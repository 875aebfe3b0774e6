"""`realm`: what each command prints, and where. Errors, precedence and chat have files of their own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ROOT, realm, spawn
from gguf import GGUFReader
from tiny import write_model
from typer.main import get_command

import realm_jax
from realm_jax import LLM, SamplingParams, cli, gguf, hub
from realm_jax.tokenizer import Tokenizer

pytestmark = pytest.mark.unoptimized

KEYS = {
    "text": str,
    "token_ids": list,
    "prompt_token_ids": list,
    "finish_reason": str,
    "seed": int,
    "usage": dict,
    "timings": dict,
}
USAGE = {"prompt_tokens", "completion_tokens"}
TIMINGS = {"load_s", "compile_s", "prefill_s", "decode_s", "prefill_tps", "decode_tps"}


def commands(group: Any, *above: str) -> Iterator[str]:
    """What stands after `realm` for every command that there is."""
    for name, command in group.commands.items():
        yield " ".join((*above, name))
        if hasattr(command, "commands"):
            yield from commands(command, *above, name)


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model, max_num_seqs=1)


def generated(model: Path, *arguments: object, stdin: str = "") -> dict:
    """The one JSON object that `realm generate --json` prints."""
    done = realm("generate", "-m", model, "--json", *arguments, stdin=stdin)
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("command", list(commands(get_command(cli.app))))
def test_help_has_an_example_and_fits_80_columns(command: str):
    done = realm(*command.split(), "--help", env={"COLUMNS": "80"})
    assert done.code == 0 and done.err == ""
    assert f"Usage: realm {command}" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    if command not in ("models", "lora", "convert", "serve", "serve keys"):
        assert f"Example: realm {command}" in done.out
        assert "--verbose" in done.out and "--config" in done.out


def test_help_says_every_default():
    out = " ".join(realm("generate", "--help", env={"COLUMNS": "80"}).out.split())
    for default in ("0.8 or the file's", "40 or the file's", "the model's context, at most 4096", "auto"):
        assert f"[default: {default}]" in out
    assert "[default: smollm2-135m-instruct]" in out


def test_version():
    done = realm("--version")
    assert (done.code, done.out, done.err) == (0, f"realm {realm_jax.__version__}\n", "")


@pytest.mark.slow
def test_the_module_is_the_command_and_help_is_quick():
    done = min((spawn("--help") for _ in range(3)), key=lambda done: done.seconds)
    assert done.code == 0 and "generate" in done.out
    assert done.seconds < 1.0  # 0.2 s alone on a machine; importing jax would take longer


def test_help_loads_neither_jax_nor_flax():
    code = "import sys, realm_jax.cli; sys.exit(bool({'jax', 'flax', 'numpy'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_json_is_the_contract(tiny_model: Path, llm: LLM):
    found = generated(tiny_model, "hello", "--raw", "-n", 6, "--temperature", 0, "--seed", 7)
    assert {key: type(value) for key, value in found.items()} == KEYS
    assert found["usage"].keys() == USAGE and found["timings"].keys() == TIMINGS
    assert all(isinstance(value, float) and value >= 0 for value in found["timings"].values())
    (output,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=6, seed=7))
    assert found["text"] == output.text
    assert found["token_ids"] == output.token_ids
    assert found["prompt_token_ids"] == output.prompt_token_ids
    assert found["finish_reason"] == output.finish_reason == "length"
    assert found["seed"] == 7
    assert found["usage"] == {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": 6}


def test_json_has_log_probabilities_when_asked(tiny_model: Path, llm: LLM):
    found = generated(tiny_model, "hello", "--raw", "-n", 4, "--temperature", 0, "--logprobs", 3)
    (output,) = llm.generate("hello", SamplingParams(temperature=0, max_tokens=4, logprobs=3))
    assert found.keys() == {*KEYS, "logprobs"}
    assert found["logprobs"] == output.logprobs
    assert [len(each["top"]) for each in found["logprobs"]] == [3] * 4


def test_the_answer_is_on_stdout_and_all_else_on_stderr(tiny_model: Path):
    arguments = ("--raw", "hello", "-n", 6, "--temperature", 0, "--seed", 11)
    done = realm("generate", "-m", tiny_model, *arguments)
    assert done.out == generated(tiny_model, *arguments)["text"] + "\n"
    assert "6 tokens at " in done.err and "loading " in done.err and "seed 11" in done.err


def test_the_chat_template_is_applied_unless_raw(tiny_model: Path, llm: LLM):
    brief = ("-n", 1, "--temperature", 0)
    templated = llm.chat_prompt([{"role": "user", "content": "hello"}])
    with_system = llm.chat_prompt(
        [{"role": "system", "content": "sys"}, {"role": "user", "content": "hello"}]
    )
    assert generated(tiny_model, "hello", *brief)["prompt_token_ids"] == templated
    assert generated(tiny_model, "hello", "--system", "sys", *brief)["prompt_token_ids"] == with_system
    raw = generated(tiny_model, "hello", "--raw", *brief)["prompt_token_ids"]
    assert raw == llm.tokenizer.encode("hello", add_special=True, parse_special=True) != templated


def test_a_prompt_may_come_from_anywhere(tiny_model: Path, tmp_path: Path):
    text = "hello, wörld\nsecond line\n"
    file = tmp_path / "prompt.txt"
    file.write_text(text, "utf-8")
    ways = [(text,), ("-p", text), ("-f", file), ("-",), ("-p", "-"), ("-f", "-")]
    prompts = [generated(tiny_model, *way, "--raw", "-n", 1, stdin=text)["prompt_token_ids"] for way in ways]
    assert all(prompt == prompts[0] for prompt in prompts)


def test_samples_are_those_of_the_same_seed_alone(tiny_model: Path):
    arguments = ("hello", "--raw", "-n", 5, "--seed", 3, "--temperature", 1.5)
    found = generated(tiny_model, *arguments, "--num-samples", 3)
    alone = generated(tiny_model, *arguments)
    assert found.keys() == {*KEYS, "samples"}
    assert found["samples"][0]["text"] == alone["text"] == found["text"]
    assert len({tuple(sample["token_ids"]) for sample in found["samples"]}) == 3
    assert found["usage"]["completion_tokens"] == sum(len(s["token_ids"]) for s in found["samples"])
    printed = realm("generate", "-m", tiny_model, *arguments, "--num-samples", 3).out
    shown = "".join(f"--- sample {i + 1}\n{sample['text']}\n" for i, sample in enumerate(found["samples"]))
    assert printed == shown


def test_the_seed_decides_and_a_drawn_one_repeats(tiny_model: Path):
    arguments = ("hello", "--raw", "-n", 8, "--temperature", 1)
    drawn = generated(tiny_model, *arguments)
    again = generated(tiny_model, *arguments, "--seed", drawn["seed"])
    assert again["token_ids"] == drawn["token_ids"]
    assert generated(tiny_model, *arguments)["seed"] != drawn["seed"]


def test_text_ends_before_the_first_stop_string(tiny_model: Path):
    arguments = ("hello", "--raw", "-n", 24, "--temperature", 0)
    whole = generated(tiny_model, *arguments)["text"]
    stops = [whole[5:7], whole[9:11]]
    found = generated(tiny_model, *arguments, "--stop", stops[0], "--stop", stops[1])
    assert found["text"] == whole[: min(whole.index(stop) for stop in stops)]
    assert found["finish_reason"] == "stop"


def test_tokenize_agrees_with_the_tokenizer(tiny_model: Path):
    tokenizer = Tokenizer.from_gguf(tiny_model)
    text = "hello </s> wörld"
    for flags, special in (((), True), (("--no-special",), False)):
        ids = tokenizer.encode(text, add_special=special, parse_special=special)
        command = ("tokenize", "-m", tiny_model, *flags)
        assert json.loads(realm(*command, text, "--ids").out) == ids
        assert json.loads(realm(*command, "-", "--ids", stdin=text).out) == ids
        assert realm(*command, text, "--count").out == f"{len(ids)}\n"
        lines = realm(*command, text).out.splitlines()
        assert [int(line.split()[0]) for line in lines] == ids
        assert [line.split("  ")[-1] for line in lines] == [repr(tokenizer.token_text(i)) for i in ids]


def test_inspect_says_the_same_as_json_and_as_a_table(tiny_model: Path):
    facts = json.loads(realm("inspect", tiny_model, "--json").out)
    assert (facts["architecture"], facts["layers"], facts["vocab_size"]) == ("llama", 2, 320)
    assert facts["file_bytes"] == tiny_model.stat().st_size
    done = realm("inspect", tiny_model)
    assert done.code == 0 and done.err == ""
    for said in (str(tiny_model), "llama", "SPM, 320 tokens", "F32", "2,048", "default on cpu"):
        assert said in done.out


def test_inspect_lists_every_tensor(tiny_model: Path):
    listed = json.loads(realm("inspect", tiny_model, "--json", "--tensors").out)["tensors"]
    with gguf.open(tiny_model) as file:
        expected = [
            {"name": t.name, "shape": list(t.shape), "type": t.ggml_type.name, "bytes": t.nbytes}
            for t in file.tensors.values()
        ]
    assert listed == expected
    out = realm("inspect", tiny_model, "--tensors").out
    assert all(tensor["name"] in out for tensor in expected)


def test_inspect_check_names_a_tensor_that_is_not_finite(tiny_model: Path, tmp_path: Path):
    sound = realm("inspect", tiny_model, "--check")
    assert sound.code == 0 and "all tensors are sound" in sound.out
    file = write_model(tmp_path / "broken.gguf")
    (tensor,) = (t for t in GGUFReader(file, "r+").tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data[3, 5] = np.nan  # a map of the file
    for flags in ((), ("--json",)):
        done = realm("inspect", file, "--check", *flags)
        assert done.code == 1 and "blk.1.ffn_up.weight" in done.out
        assert done.err.splitlines()[-1] == "error: broken.gguf: 1 tensor is broken"
    (problem,) = json.loads(realm("inspect", file, "--check", "--json").out)["problems"]
    assert problem["tensor"] == "blk.1.ffn_up.weight" and "1 of " in problem["what"]


def test_models_lists_and_locates(tmp_path: Path):
    env = {"REALM_CACHE": str(tmp_path)}
    absent = realm("models", "list", env=env)
    assert absent.code == 0 and "smollm2-135m-instruct (default)" in absent.out
    assert "not downloaded" in absent.out and "Apache-2.0" in absent.out
    known = hub.known_models()[hub.DEFAULT_MODEL]
    local = tmp_path / "models" / known.name / known.file
    local.parent.mkdir(parents=True)
    with local.open("wb") as file:
        file.truncate(known.size)  # its length is what a start looks at
    assert str(local) in realm("models", "list", env=env).out
    for command in (("path",), ("path", known.name), ("pull", "--offline"), ("pull", known.name)):
        assert realm("models", *command, env=env).out == f"{local}\n"


def test_doctor_describes_this_machine():
    facts = json.loads(realm("doctor", "--json").out)
    assert facts["realm_jax"] == realm_jax.__version__
    assert facts["backend"] in ("cpu", "gpu", "tpu") and facts["devices"]
    assert facts["dtype"] == "bfloat16" and facts["cpus"] >= 1
    assert 0 < len(facts["programs"]) <= 24
    out = realm("doctor").out
    assert all(program in out for program in facts["programs"]) and facts["cache"] in out


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux lists them")
def test_threads_decide_how_many_run():
    code = """
import os, sys
from realm_jax import runtime
from realm_jax.config import EngineConfig
runtime.configure(EngineConfig(threads=int(sys.argv[1])))
import jax.numpy as jnp
(jnp.ones((512, 512)) @ jnp.ones((512, 512))).block_until_ready()
print(len(os.listdir("/proc/self/task")))
"""
    command = [sys.executable, "-c", code]
    counts = [int(subprocess.check_output([*command, str(threads)], cwd=ROOT)) for threads in (4, 8)]
    assert counts[1] - counts[0] >= 4
