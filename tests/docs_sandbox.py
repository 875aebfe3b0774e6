"""A folder in which the commands of the documentation run: a tiny model has the default model's name.

`FILES` and `Sandbox._models` say what lies there under the names that pages use.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import typer
from command_line import ROOT, realm
from docs_blocks import Block, Command
from hf_folders import golden
from peft_files import base_of, pair, write_adapter
from running_server import running
from tiny import write_model

from realm_jax import LLM, cli, hub
from realm_jax.lora import Adapter, LowRank
from realm_jax.lora.export import write_gguf
from realm_jax.serving.server.process import RealmServer

EXAMPLE = {"messages": [{"role": "user", "content": "Say a."}, {"role": "assistant", "content": "a b"}]}
QUESTIONS = [{"id": str(i), "prompt": f"Name {i}", "max_tokens": 4} for i in range(3)]
FILES: dict[str, object] = {
    "question.txt": "Name a river.",
    "book.txt": "the quick brown fox jumps over the lazy dog " * 80,
    "calibration.txt": "the lazy dog sleeps while the quick brown fox jumps " * 40,
    "serve.toml": '[[models]]\nname = "big"\nmodel = "big.gguf"\n',
    "questions.jsonl": QUESTIONS,
    "in.jsonl": [*QUESTIONS, {"id": "p", "prompt": "Name", "max_tokens": 4, "lora": "poet"}],
    "examples.jsonl": [EXAMPLE] * 24,
    "person.json": {"type": "object", "properties": {"adult": {"type": "boolean"}}, "required": ["adult"]},
    "answer.gbnf": 'root ::= "yes" | "no"\n',
}
"""Name -> text, rows of JSON, or JSON. A page that names another file adds it here."""
SMALL: dict[str, Any] = {"ctx_size": 512, "max_num_seqs": 4}
"""Of an `LLM` that does not say otherwise, so that commands and programs share what is compiled."""
DEFAULTS = {"REALM_MAX_TOKENS": "8", "REALM_CTX_SIZE": str(SMALL["ctx_size"])}
"""Of commands that do not say otherwise: a model of random weights seldom ends an answer."""
QUICK = {
    "batch": "max-num-seqs = 4",
    "bench": "repetitions = 1",
    "lora train": "steps = 2\nbatch-size = 4\nrank = 4",
}
"""By command, a file for --config: less of the same work. A flag in the page wins over it."""
TYPED = "Name a river.\n/reset\n"
ADDRESS = re.compile(r"(?:localhost|127\.0\.0\.1):8000")
SHELL = set("|&;<>()$`*?{")
EXTRAS = re.compile(r"(?:\.|realm[-_]jax)\[([\w,-]+)\]")


class Failed(AssertionError):
    """A command or program of a page does not do what the page says."""


class Sandbox:
    """The folder, the caches, and a server for those who ask one."""

    def __init__(self, folder: Path) -> None:
        self._models_folder, self._cache = folder / "models", folder / "cache"
        for each in (self._models_folder, self._cache, folder / "data", folder / "bin"):
            each.mkdir()
        programs = hub.cache_dir() / "xla"
        programs.mkdir(parents=True, exist_ok=True)
        (self._cache / "xla").symlink_to(programs.absolute(), target_is_directory=True)
        for name, module in {"realm": "-m realm_jax", "python": "", "python3": ""}.items():
            script = folder / "bin" / name
            script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
            script.chmod(0o755)
        self._stack, self._server = ExitStack(), None
        self._write_models()
        self.environment = DEFAULTS | {
            "REALM_CACHE": str(self._cache),
            "REALM_OFFLINE": "1",
            "REALM_MODEL": str(self._models_folder / "model.gguf"),
            "XDG_DATA_HOME": str(folder / "data"),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }

    def _write_models(self) -> None:
        """model.gguf, a draft of it and adapters; the first also where `hf:` and the default are kept."""
        folder = self._models_folder
        model = write_model(folder / "model.gguf", layers=1, context=4096)
        write_model(folder / "draft.gguf", layers=1, context=4096, seed=1)
        for name in ("adapter", "clerk"):
            write_adapter(folder / name, pair("model.layers.0.mlp.up_proj", 96, 64))
        for name in ("small", "big", "model-bf16"):
            (folder / f"{name}.gguf").symlink_to(model)
        golden("qwen2", folder).rename(folder / "Qwen2.5-0.5B-Instruct")
        base = base_of(model)
        given = pair("up", 96, 64, seed=1)
        change = LowRank(given["up.lora_A.weight"], given["up.lora_B.weight"], 0.1)
        for name in ("poet", "judge", "adapter"):
            write_gguf(Adapter(name, {"blk.0.ffn_up.weight": change}), base, folder / f"{name}.gguf")
        default = hub.known_models()[hub.DEFAULT_MODEL]
        for place in (f"models/{default.name}/{default.file}", "huggingface/owner/repo/main/file.gguf"):
            (self._cache / place).parent.mkdir(parents=True)
            (self._cache / place).symlink_to(model)
        self._default = dataclasses.replace(default, size=model.stat().st_size)

    def close(self) -> None:
        """The server, if one was needed, has ended."""
        self._stack.close()

    def server(self) -> str:
        """HOST:PORT of a server of the model, which is started for the first who asks."""
        if self._server is None:
            poet = {"poet": self._models_folder / "poet.gguf"}
            llm = LLM(self._models_folder / "model.gguf", lora=poet, **SMALL)
            self._server = self._stack.enter_context(running(llm, names=(hub.DEFAULT_MODEL,)))
        return self._server.address.removeprefix("http://")

    @contextlib.contextmanager
    def page(self, folder: Path) -> Iterator["Page"]:
        """A page's own folder, with the files that pages name; it is the working directory."""
        folder.mkdir(exist_ok=True)
        for each in self._models_folder.iterdir():
            (folder / each.name).symlink_to(each)
        for name, value in FILES.items():
            (folder / name).write_text(_written(name, value), "utf-8")
        known = mock.patch.dict(hub.known_models(), {hub.DEFAULT_MODEL: self._default})
        with contextlib.chdir(folder), mock.patch.dict(os.environ, self.environment), known, _small_engines():
            yield Page(self, folder)


@contextlib.contextmanager
def _small_engines() -> Iterator[None]:
    original = LLM.__init__

    def begin(llm: LLM, model: str | Path | None = None, **options: Any) -> None:
        original(llm, model, **(SMALL | options))

    with mock.patch.object(LLM, "__init__", begin):
        yield


def _written(name: str, value: object) -> str:
    if name.endswith(".jsonl") and isinstance(value, list):
        return "".join(json.dumps(row) + "\n" for row in value)
    return value if isinstance(value, str) else json.dumps(value)


class Page:
    """What the blocks of one page share: the folder, and the names of its Python."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self._sandbox, self._folder = sandbox, folder
        self._names: dict[str, Any] = {"__name__": "__main__"}

    def run(self, block: Block) -> list[str]:
        """What of the block does not work. All of it has run, or, if exempt, was checked as can be."""
        if block.language == "python":
            return _failure(self._program, block)
        commands = block.commands()
        return [
            each
            for command in commands
            for each in _failure(
                self._command if block.reason(command.text) is None else check_words, block, command
            )
        ]

    def _program(self, block: Block) -> None:
        try:
            code = compile("\n" * (block.line - 1) + self._addressed(block.text, block), block.page, "exec")
        except SyntaxError as error:
            raise Failed(f"{block.page}:{error.lineno}: {error.msg}") from None
        if block.reason(block.text) is None:
            self._execute(code, block)

    def _addressed(self, text: str, block: Block) -> str:
        """The text with the running server's address where it has the default one."""
        if block.reason(text) is not None or not ADDRESS.search(text):
            return text
        return ADDRESS.sub(self._sandbox.server(), text)

    def _execute(self, code: Any, block: Block) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                exec(code, self._names)
            except Exception as error:
                at = next(
                    (f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == block.page),
                    block.line,
                )
                raise Failed(f"{block.page}:{at}: {type(error).__name__}: {error}") from error

    def _command(self, block: Block, command: Command) -> None:
        where, words = f"{block.page}:{command.line}", _words(command.text)
        if words[:2] == ["pip", "install"]:
            check_extras(where, command.text)
        elif words[0].startswith(("scripts/", ".venv/")):
            raise Failed(f"{where}: {words[0]} is not run here; say why: <!-- not run: REASON -->")
        elif words[0] == "realm" and not SHELL & set(_unquoted(command.text)):
            arguments, env = words[1:], self._sandbox.environment | self._quick(words)
            is_server = words[1:2] == ["serve"] and "keys" not in words
            with _ends_when_ready() if is_server else contextlib.nullcontext([True]) as was_ready:
                done = realm(*arguments, *(["--port", 0] if is_server else []), stdin=TYPED, env=env)
            if done.code != 0 or not was_ready:
                raise Failed(f"{where}: {command.text}: exit {done.code}: {done.err[-2000:]}")
        else:
            self._shell(where, self._addressed(command.text, block))

    def _quick(self, words: list[str]) -> dict[str, str]:
        """A file for --config where the command has one; the page's own stays."""
        for name, text in QUICK.items():
            if words[1:][: len(name.split())] == name.split() and "--config" not in words:
                file = self._folder / ".quick.toml"
                file.write_text(text)
                return {"REALM_CONFIG": str(file)}
        return {}

    def _shell(self, where: str, text: str) -> None:
        strict = f"set -euo pipefail\n{text}\n"
        done = subprocess.run(
            ["bash", "-c", strict], input=TYPED, capture_output=True, text=True, timeout=300, check=False
        )
        failed = done.returncode != 0 or ("curl" in text and '"error": {' in done.stdout)
        if failed:
            raise Failed(
                f"{where}: {text}: exit {done.returncode}: {done.stdout[-500:]}{done.stderr[-2000:]}"
            )


def _failure(step: Callable[..., None], *arguments: object) -> list[str]:
    """What the step failed with, if it did."""
    try:
        step(*arguments)
    except Failed as failed:
        return [str(failed)]
    return []


@contextlib.contextmanager
def _ends_when_ready() -> Iterator[list[bool]]:
    """A server that is started inside drains as soon as it serves; the list says that it did."""
    was_ready: list[bool] = []
    original = RealmServer._start

    async def start(server: RealmServer) -> None:
        await original(server)
        was_ready.append(server.service.is_ready)
        server.drain()

    with mock.patch.object(RealmServer, "_start", start):
        yield was_ready


def _words(text: str) -> list[str]:
    """The words of a command, whose lines may go on."""
    return shlex.split(text.replace("\\\n", " "), comments=True)


def _unquoted(text: str) -> str:
    """A command without what is quoted and without its comment."""
    return re.sub(r"(^|\s)#.*", "", re.sub(r"'[^']*'|\"[^\"$`]*\"|\\\n", "", text))


def check_extras(where: str, text: str) -> None:
    """The extras that are to be installed are the project's. Raises Failed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for names in EXTRAS.findall(text):
        if unknown := set(names.split(",")) - project["optional-dependencies"].keys():
            raise Failed(f"{where}: no such extra: {', '.join(sorted(unknown))}")


def check_words(block: Block, command: Command) -> None:
    """What is not run is there at least: the command line parses, the script exists. Raises Failed."""
    where, words = f"{block.page}:{command.line}", _words(command.text)
    if words[0] == "realm":
        try:
            _parse(words[1:])
        except typer.TyperException as error:
            raise Failed(f"{where}: {command.text}: {error.format_message()}") from error
    elif words[0].startswith("scripts/"):
        script = ROOT / words[0]
        if not os.access(script, os.X_OK):
            raise Failed(f"{where}: there is no {words[0]}")
        named = re.findall(r"tests/\w+\.py", text := script.read_text())
        text += "".join((ROOT / each).read_text() for each in named)
        for flag in (word.partition("=")[0] for word in words if word.startswith("--")):
            if flag not in text:
                raise Failed(f"{where}: {words[0]} has no {flag}")
    elif shutil.which(words[0]) is None and "/" in words[0] and not words[0].startswith(".venv/"):
        raise Failed(f"{where}: there is no {words[0]}")


def _parse(arguments: list[str]) -> None:
    """The arguments are ones that the command line takes; nothing is run."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("realm", list(arguments), obj=cli.Run())
    while getattr(command, "commands", None) and (rest := [*context._protected_args, *context.args]):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
