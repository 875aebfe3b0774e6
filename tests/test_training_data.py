"""Examples: what is learned of a line, which lines are refused, and how lines become batches."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realm_jax import gguf
from realm_jax.chat import ChatTemplate
from realm_jax.errors import RequestError
from realm_jax.tokenizer import Tokenizer
from realm_jax.training.batches import BUCKETS, Batches, split
from realm_jax.training.data import MAX_LINE, Example, Reader

CHATML = (  # as many models have it, with an end token after each turn
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
FORGETFUL = (  # shows a turn of the assistant only at the end, as templates do that strip thinking
    "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}<s>{{ m['content'] }}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
)


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    with gguf.open(tiny_model) as file:
        return Tokenizer.from_metadata(file.metadata)


@pytest.fixture(scope="module")
def reader(tokenizer: Tokenizer) -> Reader:
    return Reader(tokenizer, ChatTemplate(CHATML), 64)


def learned(reader: Reader, example: Example) -> list[str]:
    """The texts of the runs of targets."""
    runs, ids = [[]], example.ids.tolist()
    for token, is_target in zip(ids, example.is_target.tolist(), strict=True):
        if is_target:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [reader.tokenizer.decode(run, continues=True) for run in runs if run]


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)


@settings(deadline=None, max_examples=30)
@given(st.lists(texts, min_size=2, max_size=5))
def test_what_the_assistant_says_is_learned_with_its_end_token(reader: Reader, said: list[str]):
    example = reader.example({"messages": turns(*said)})
    assert learned(reader, example) == [f"{text}</s>" for text in said[1::2]]
    text = ChatTemplate(CHATML).render(turns(*said), add_generation_prompt=False)
    assert example.ids.tolist() == reader.tokenizer.encode(text, add_special=False, parse_special=True)
    assert example.is_target.shape == example.ids.shape


@settings(deadline=None, max_examples=30)
@given(texts, texts)
def test_a_completion_is_learned_and_ended(reader: Reader, prompt: str, completion: str):
    example = reader.example({"prompt": prompt, "completion": completion})
    before = reader.tokenizer.encode(prompt, add_special=True, parse_special=True)
    assert example.ids[-1] == reader.tokenizer.eos_id and example.is_target[-1]
    assert not example.is_target[0]
    first = int(example.is_target.argmax())
    # the first target, at the latest, is where the prompt's own tokens end
    assert example.is_target[first:].all() and first <= max(len(before), 1)
    assert example.ids[:first].tolist() == before[:first]


def test_an_end_token_is_added_where_the_template_has_none(tokenizer: Tokenizer, tiny_model: Path):
    with gguf.open(tiny_model) as file:
        template = ChatTemplate.from_metadata(file.metadata)
    example = Reader(tokenizer, template, 64).example({"messages": turns("a", "b", "c", "d")})
    assert example.ids[-1] == tokenizer.eos_id and example.is_target[-1]
    assert (example.ids == tokenizer.eos_id).sum() == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Tokenizer):
    reader = Reader(tokenizer, ChatTemplate(FORGETFUL), 64)
    assert learned(reader, reader.example({"messages": turns("hi", "yes")})) == [" yes</s>"]
    with pytest.raises(RequestError, match=r"messages\[1\]: the chat template shows a turn otherwise"):
        reader.example({"messages": turns("hi", "yes", "more", "no")})


GOOD = json.dumps({"prompt": "a", "completion": "b"}).encode()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "no JSON"),
        (b'{"prompt": "\xff", "completion": ""}', "no UTF-8"),
        (b"[" * 100_000, "no JSON"),
        (b'{"prompt": ' + b"1" * 5000 + b"}", "no JSON"),
        (b"[1]", "no object"),
        (b"{}", "fields are none"),
        (b'{"prompt": "a"}', "fields are prompt"),
        (b'{"prompt": "a", "completion": "b", "messages": []}', "fields are completion, messages, prompt"),
        (b'{"prompt": "a", "completion": 3}', "completion is '3'; it must be a text"),
        (b'{"messages": "hello"}', "messages must be a list"),
        (b'{"messages": []}', "messages must be a list of at least one"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "no turn of the role 'assistant'"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content is missing"),
        (b'{"messages": [{"role": "assistant", "content": "x"}]}', r"messages\[0\] is the assistant's"),
        (b'{"prompt": "' + b"a b " * 50 + b'", "completion": "b"}', "raise --ctx-size"),
        (b'"' + b"a" * MAX_LINE + b'"', "the limit of a line"),
    ],
)
def test_a_line_that_is_no_example_is_named(tmp_path: Path, reader: Reader, line: bytes, words: str):
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(RequestError, match=words) as caught:
        reader.read(file)
    assert "data.jsonl, line 3: " in str(caught.value) and len(str(caught.value)) < 400


def test_long_lines_are_left_out_when_asked(tmp_path: Path, tokenizer: Tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_bytes(GOOD + b'\n{"prompt": "' + b"a b " * 50 + b'", "completion": "b"}\n')
    examples, dropped = Reader(tokenizer, None, 64, drops_long=True).read(file)
    assert len(examples) == 1 and dropped == 1
    with pytest.raises(RequestError, match="has no examples: 2 too long"):
        Reader(tokenizer, None, 2, drops_long=True).read(file)
    with pytest.raises(RequestError, match="need a chat template"):
        Reader(tokenizer, None, 64).example({"messages": turns("a", "b")})


def random_examples(lengths: list[int]) -> list[Example]:
    """Each example's tokens are its number, counted from 1."""
    return [
        Example(np.full(length, i + 1, np.int32), np.arange(length) >= length // 2)
        for i, length in enumerate(lengths)
    ]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2, 900), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(0, 99),
    st.integers(0, 60),
)
def test_every_epoch_has_every_example_once(lengths: list[int], size: int, seed: int, start: int):
    examples = random_examples(lengths)
    batches = Batches(examples, size, seed)
    epoch = batches.per_epoch
    two = list(islice(batches.starting_at(0), 2 * epoch))
    for part in (two[:epoch], two[epoch:], batches.in_order()):
        counted = Counter(int(n) for batch in part for n in batch.tokens.ravel())
        assert {n: counted[n] for n in counted if n} == {i + 1: n for i, n in enumerate(lengths)}
        assert sum(batch.targets for batch in part) == sum(int(e.is_target.sum()) for e in examples)
        assert sum(batch.length for batch in part) == sum(lengths)
    shapes = {batch.tokens.shape for batch in two}
    assert len(shapes) <= BUCKETS and {rows for rows, _ in shapes} == {size}
    again: list[Any] = list(islice(Batches(examples, size, seed).starting_at(start), 3))
    wanted = list(islice(batches.starting_at(0), start, start + 3))
    assert all((a.tokens == b.tokens).all() for a, b in zip(again, wanted, strict=True))


def test_the_split_depends_on_the_seed_alone():
    examples = random_examples([3] * 50)
    parts = [split(examples, 0.1, seed) for seed in (0, 0, 1)]
    numbers = [[int(e.ids[0]) for e in kept] for _, kept in parts]
    assert len(numbers[0]) == 5 and numbers[0] == numbers[1] != numbers[2]
    assert all(len(trained) + len(kept) == 50 for trained, kept in parts)
    assert split(examples, 0.0, 0) == (examples, [])
