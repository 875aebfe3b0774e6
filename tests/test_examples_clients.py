"""The clients under examples/clients get Paris from the default model, each where its runtime is there."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from running_server import PATIENCE, running

from realm_jax import LLM
from realm_jax.serving.server.process import RealmServer

pytestmark = pytest.mark.unoptimized

CLIENTS = Path(__file__).parents[1] / "examples" / "clients"


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[RealmServer]:
    llm = LLM(default_model, ctx_size=512, max_num_seqs=4, deterministic=True)
    with running(llm, names=("smollm2-135m-instruct",)) as server:
        yield server


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the clients and the packages that they need."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("no node or npm here")
    folder = tmp_path_factory.mktemp("node") / "clients"
    shutil.copytree(CLIENTS, folder)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
    return folder


def said(server: RealmServer, *command: object, folder: Path = CLIENTS) -> str:
    """What the command says on stdout, told the server's address."""
    done = subprocess.run(
        [*map(str, command), server.address],
        check=False,
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "REALM_API_KEY"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_openai_in_python(server: RealmServer):
    assert said(server, sys.executable, "openai_chat.py").count("Paris") == 2


def test_openai_in_node(server: RealmServer, node: Path):
    assert said(server, "node", "openai_chat.mjs", folder=node).count("Paris") == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_curl(server: RealmServer):
    whole, stream = said(server, "bash", "chat.sh").split("\n", 1)
    assert "Paris" in whole
    assert "Paris" in stream
    assert stream.rstrip().endswith("data: [DONE]")


def test_websocket_in_python(server: RealmServer):
    assert "Paris" in said(server, sys.executable, "websocket_chat.py")


def test_websocket_in_node(server: RealmServer, node: Path):
    assert "Paris" in said(server, "node", "websocket_chat.mjs", folder=node)
