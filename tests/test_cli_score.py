"""`realm score`: what it prints is what `LLM.score` says."""

import json
import math
import os
import re
from pathlib import Path

import pytest
from command_line import realm

from realm_jax import LLM, SamplingParams

pytestmark = pytest.mark.unoptimized

TEXT = "the cat"


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(tiny_model)


def scored(model: Path, *arguments: object, stdin: str = "") -> dict:
    """The one JSON object that `realm score --json` prints."""
    done = realm("score", "-m", model, "--json", *arguments, stdin=stdin)
    assert done.code == 0, done.err
    (line,) = done.out.splitlines()
    return json.loads(line)


def test_a_text_is_scored_wherever_it_comes_from(llm: LLM, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    as_argument = scored(tiny_model, TEXT)
    assert as_argument == scored(tiny_model, "-", stdin=TEXT)
    assert as_argument == scored(tiny_model, "--file", tmp_path / "text.txt")
    score = llm.score(TEXT)[0]
    known = [p for p in score.logprobs if p is not None]
    assert as_argument == {
        "logprob": score.total,
        "perplexity": math.exp(-math.fsum(known) / len(known)),
        "tokens": len(known),
        "token_ids": llm.tokenizer.encode(TEXT),
        "logprobs": score.logprobs,
    }
    assert as_argument["token_ids"][0] == 1 and as_argument["logprobs"][0] is None


def test_a_text_for_a_person(llm: LLM, tiny_model: Path) -> None:
    score = llm.score(TEXT)[0]
    last = f"log-probability {score.total:.4f}, perplexity {math.exp(-score.total / 6):.4f}, 6 tokens"
    assert realm("score", TEXT, "-m", tiny_model).out == last + "\n"
    *lines, end = realm("score", TEXT, "-m", tiny_model, "--tokens").out.splitlines()
    assert end == last
    pieces = ["<s>", "▁t", "h", "e", "▁c", "a", "t"]
    shown = ["-" if p is None else f"{p:.4f}" for p in score.logprobs]
    expected = zip(map(str, score.token_ids), shown, map(repr, pieces), strict=True)
    assert [tuple(line.split()) for line in lines] == list(expected)


def chosen_letter(llm: LLM) -> tuple[str, str]:
    """A text after which the model would write a space and a letter, and these."""
    texts = [f"the {a}{b}" for a in "abcdefghij" for b in "abcdefghij"]
    outputs = llm.generate(texts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    pieces = (llm.tokenizer.token_text(output.token_ids[0]) for output in outputs)
    found = ((text, p.replace("▁", " ")) for text, p in zip(texts, pieces, strict=True) if p[0] == "▁")
    return next((text, letter) for text, letter in found if len(letter) == 2)


def test_continuations_follow_the_text(llm: LLM, tiny_model: Path) -> None:
    text, letter = chosen_letter(llm)
    texts = [" sat", " ran off", letter]
    flags = [word for each in texts for word in ("--continuation", each)]
    scores = llm.score([text] * 3, texts)
    rows = scored(tiny_model, text, *flags)["continuations"]
    assert [row["text"] for row in rows] == texts
    for row, score in zip(rows, scores, strict=True):
        assert (row["logprob"], row["is_greedy"]) == (score.total, score.is_greedy)
        assert (row["token_ids"], row["logprobs"]) == (score.token_ids, score.logprobs)
    assert [row["is_greedy"] for row in rows] == [False, False, True]

    lines = realm("score", text, "-m", tiny_model, *flags).out.splitlines()
    for line, each, score in zip(lines, texts, scores, strict=True):
        words = "greedy" if score.is_greedy else "not greedy"
        count = "1 token" if len(score.token_ids) == 1 else f"{len(score.token_ids)} tokens"
        assert re.fullmatch(rf"{score.total:.4f} +{count} +{words} +{each!r}", line)
    with_tokens = realm("score", text, "-m", tiny_model, *flags, "--tokens").out.splitlines()
    assert len(with_tokens) == 3 + sum(len(score.token_ids) for score in scores)
    assert [line for line in with_tokens if "greedy" in line] == lines


def test_a_text_without_context_can_only_be_continued(tiny_model: Path) -> None:
    (row,) = scored(tiny_model, "", "--continuation", "cat")["continuations"]
    assert row["logprob"] == scored(tiny_model, "cat")["logprob"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["the text once", "realm score"]),
        (("a", "-f", os.devnull), ["the text once"]),
        (("",), ["nothing to score"]),
        (("the ", "--continuation", "cat"), ["'cat'", "end before a space"]),
        (("the", "--continuation", ""), ["''", "a token of its own"]),
        (("a b " * 40, "-c", "64"), ["the context is 64", "--ctx-size"]),
        (("a b", "--continuation", " c" * 70, "-c", "64"), ["the context is 64", "--ctx-size"]),
        (("-f", "missing.txt"), ["--file missing.txt"]),
    ],
)
def test_errors_are_one_line(tiny_model: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    done = realm("score", *arguments, "-m", tiny_model)
    for word in words:
        assert word in done.error, done.error
    assert done.code == 2
