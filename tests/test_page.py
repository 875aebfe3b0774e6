"""The page at `/`, in a real browser, over the default model."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from running_server import running

from realm_jax import LLM
from realm_jax.serving.server.process import RealmServer

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"
)
SCREENSHOT = os.environ.get("REALM_SCREENSHOT")  # where to leave a picture of the page


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[RealmServer]:
    llm = LLM(default_model, ctx_size=512, max_num_seqs=4, deterministic=True)
    with running(llm, names=("smollm2-135m-instruct",)) as server:
        yield server


@pytest.fixture
def page(server: RealmServer) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(server.address + "/")
        browser.wait_for("document.querySelector('#model')?.options.length")
        yield browser
        assert not browser.problems


def ask(page: Browser, question: str) -> None:
    page.evaluate(f"document.querySelector('#prompt').value = {question!r}")
    page.evaluate("document.querySelector('#ask').requestSubmit()")


def test_a_person_asks_for_the_capital_of_france(page: Browser):
    for name, value in (("system", "You answer in one short sentence."), ("temperature", "0")):
        page.evaluate(f"document.querySelector('#settings').elements.{name}.value = {value!r}")
    ask(page, "What is the capital of France?")
    counts = page.wait_for("document.querySelector('article.assistant small')?.textContent")
    assert "Paris" in page.evaluate("document.querySelector('article.assistant').firstChild.data")
    assert re.fullmatch(r"\d+ \+ \d+ tokens, first after [\d.]+ s, then [\d.]+ tokens/s", counts)
    page.wait_for("Number(document.querySelector('#generated').textContent) > 0")  # live figures
    if SCREENSHOT is not None:
        page.screenshot(Path(SCREENSHOT))


def test_an_answer_streams_and_can_be_stopped(page: Browser, server: RealmServer):
    ask(page, "Tell me a long story.")
    page.wait_for("document.querySelector('article.assistant')?.firstChild.data.length > 5")
    page.evaluate("document.querySelector('#stop').click()")
    assert page.wait_for("document.querySelector('article.assistant small')?.textContent") == "stopped"
    page.wait_for("document.querySelector('#running').textContent === '0'")


def test_what_the_server_refuses_is_said(page: Browser):
    page.evaluate("document.querySelector('#settings').elements.temperature.value = '-1'")
    ask(page, "Hello")
    assert "temperature" in page.wait_for("document.querySelector('article.assistant small')?.textContent")
    page.problems.clear()  # the browser notes the 400
