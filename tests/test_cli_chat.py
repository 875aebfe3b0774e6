"""`realm chat`, through pipes and on a terminal; Ctrl-C and a closed stdout."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_line import ROOT, environment, realm, start

pytestmark = pytest.mark.unoptimized

# a session leader takes the terminal that it opens its streams on only when it says so
ON_A_TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from realm_jax.cli import main
main()
"""


def answers(out: str) -> list[str]:
    return out.removesuffix("\n").split("\n")


def chat(model: Path, *lines: str, **options: str) -> tuple[list[str], str]:
    """The answers, and what was said on stderr."""
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = realm(
        "chat", "-m", model, "-n", 6, "--temperature", 0, *flags, stdin="".join(f"{line}\n" for line in lines)
    )
    assert done.code == 0, done.err
    return answers(done.out), done.err


@pytest.fixture(scope="module")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose end token never comes first: its answers run to the context's end."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("talkative") / "talkative.gguf", seed=3, context=1 << 15)


def test_a_conversation_remembers_and_saves(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "saved.json"
    said, err = chat(tiny_model, "hello", "more", f"/save {file}", system="Be brief.")
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["hello", "more"]
    assert "\n".join(m["content"] for m in saved if m["role"] == "assistant") == "\n".join(said)
    assert f"saved 5 messages to {file}" in err


def test_each_answer_is_what_generate_gives_for_the_conversation(tiny_model: Path, tmp_path: Path):
    from realm_jax import LLM, SamplingParams

    file = tmp_path / "saved.json"
    chat(tiny_model, "a", "b", "c", f"/save {file}")
    saved = json.loads(file.read_text())
    llm = LLM(tiny_model, max_num_seqs=1)
    for i in range(1, len(saved), 2):
        output = llm.chat(saved[:i], SamplingParams(temperature=0, max_tokens=6))
        assert saved[i]["content"] == output.text


def test_reset_forgets_all_but_the_system_message(tiny_model: Path, tmp_path: Path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    chat(tiny_model, "hello", "/reset", "again", f"/save {first}", system="Be brief.")
    chat(tiny_model, "again", f"/save {second}", system="Be brief.")
    assert json.loads(first.read_text()) == json.loads(second.read_text())


def test_commands_and_their_mistakes_go_on(tiny_model: Path, tmp_path: Path):
    said, err = chat(
        tiny_model, "/help", "/nosuch", "/save", f"/save {tmp_path}/no/where.json", "", "/quit", "unread"
    )
    assert said == [""]
    for part in ("/reset ", "/save FILE", "unknown command '/nosuch'", "unknown command '/save'"):
        assert part in err
    assert "not saved: " in err and "Traceback" not in err


def test_a_line_that_does_not_fit_is_an_error_and_the_conversation_goes_on(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "saved.json"
    _, err = chat(tiny_model, "hello " * 1000, "hi", f"/save {file}")
    assert "error: " in err and "2,048" in err and "/reset" in err and "Traceback" not in err
    assert [m["role"] for m in json.loads(file.read_text())] == ["user", "assistant"]


@dataclass
class Terminal:
    """A command on a terminal of its own."""

    process: subprocess.Popen[bytes]
    end: int
    seen: str = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self.end, text.encode())

    def screen(self) -> str:
        """What a person sees: without colours, and of an overwritten line only the last."""
        shown = re.sub(r"[^\n]*\n(\x1b\[\?25h)?\r\x1b\[1A\x1b\[2K", "", self.seen)  # one line up, and wiped
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
        return "\n".join(line.rstrip("\r").split("\r")[-1] for line in plain.split("\n"))

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        """Reads until the screen shows the pattern below what was typed last."""
        limit = time.monotonic() + seconds
        while not re.search(pattern, self.screen()):
            ready, _, _ = select.select([self.end], [], [], max(0, limit - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.seen[-2000:]!r}"
            self.seen += os.read(self.end, 65536).decode(errors="replace")

    def finish(self) -> int:
        """The exit code, once all output has been read."""
        limit = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < limit:
            self.drain(0.1)
        self.drain(0)
        return self.process.wait(1)

    def drain(self, seconds: float) -> None:
        while select.select([self.end], [], [], seconds)[0]:
            try:
                self.seen += os.read(self.end, 65536).decode(errors="replace")
            except OSError:  # Linux says so when the other end is closed
                return


@contextmanager
def terminal(*arguments: object, **variables: str) -> Iterator[Terminal]:
    end, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *map(str, arguments)],
        cwd=ROOT,
        env=environment({"TERM": "xterm", "COLUMNS": "100", **variables}),
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
    )
    os.close(other)
    try:
        yield Terminal(process, end)
    finally:
        process.kill()
        process.wait()
        os.close(end)


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_the_answer_and_the_conversation_goes_on(talkative: Path, tmp_path: Path):
    file = tmp_path / "saved.json"
    with terminal("chat", "-m", talkative, "-c", 1 << 15, "--temperature", 0) as screen:
        screen.wait_for(r"/help lists the commands\n> ")
        for line in ("hello", "again"):
            screen.type(f"{line}\r")
            screen.wait_for(rf"{line}\n(?!.*compiling).{{3}}")
            screen.type("\x03")
            screen.wait_for("\n> $", 20)
        time.sleep(0.5)  # readline is not waiting yet when its prompt appears
        screen.type("half a line\x03")  # with no answer to stop, it drops the line
        screen.wait_for("\n> $", 20)
        screen.type(f"/save {file}\r")
        screen.wait_for("saved 4 messages")
        screen.type("\x04")
        assert screen.finish() == 0
        assert "Traceback" not in screen.seen
    saved = json.loads(file.read_text())
    assert [m["role"] for m in saved] == ["user", "assistant"] * 2
    assert all(m["content"] for m in saved)


@pytest.mark.slow
def test_a_terminal_shows_progress_and_keeps_only_the_answer(talkative: Path):
    anew = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # nothing that ran before is found
    with terminal("generate", "-m", talkative, "hi", "-n", 8, "--temperature", 0, **anew) as screen:
        assert screen.finish() == 0
        shown, lines = screen.seen, screen.screen().split("\n")
    piped = realm("generate", "-m", talkative, "hi", "-n", 8, "--temperature", 0)
    assert "compiling prefill" in shown
    assert lines[-3:-1] == [piped.out.rstrip("\n"), lines[-2]]
    assert lines[-2].startswith("8 tokens at ") and lines[-1] == ""


@pytest.mark.slow
def test_ctrl_c_during_generate_exits_130_without_traceback(talkative: Path):
    with start("generate", "-m", talkative, "-c", 1 << 15, "hi", "--temperature", 0) as process:
        assert process.stdout and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err and b"error" not in err


@pytest.mark.slow
def test_a_reader_that_leaves_ends_generate_quietly(talkative: Path):
    with start("generate", "-m", talkative, "hi", "--temperature", 0, "-n", 400) as process:
        assert process.stdout and process.stderr and process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 1
    assert b"Traceback" not in err and b"Exception ignored" not in err
