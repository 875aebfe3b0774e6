"""A stream is the whole text, in parts that are safe to show."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import opened

from realm_jax.errors import RequestError
from realm_jax.tokenizer import TextStream

STREAMED = ["llama-spm", "gpt-2", "llama-bpe"]  # byte tokens; cleaned spaces


def cut(text: str, stop: list[str]) -> str:
    """The text before the stop string that ends first, and of these the longest."""
    met = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    return text[: min(met)[1]] if met else text


@pytest.mark.parametrize("name", STREAMED)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_joined_are_the_whole(fixtures: Path, name: str, data: st.DataObject):
    tokenizer = opened(fixtures, name)
    some = st.integers(0, 600) | st.integers(0, tokenizer.vocab_size - 1)
    texts = st.text(" '.?!,smrvet\n", max_size=12) | st.text(max_size=8)
    parts = data.draw(st.lists(st.lists(some, max_size=6) | texts, max_size=8))
    ids = [i for part in parts for i in (tokenizer.encode(part, False) if isinstance(part, str) else part)]
    skip, continues = data.draw(st.booleans()), data.draw(st.booleans())
    whole = tokenizer.decode(ids, skip, continues=continues)
    pieces = st.integers(0, len(whole)).flatmap(
        lambda start: st.integers(1, 9).map(lambda size: whole[start : start + size])
    )
    stop = [piece for piece in data.draw(st.lists(pieces | st.just("zz"), max_size=3)) if piece]

    stream = TextStream(tokenizer, stop, skip, continues=continues)
    deltas = []
    for token in ids:
        deltas.append(stream.push(token))
        shown = "".join(deltas)
        assert cut(whole, stop).startswith(shown) and stream.text == shown
    deltas.append(stream.finish())
    assert "".join(deltas) == stream.text == cut(whole, stop)
    assert (stream.stopped is not None) == any(s in whole for s in stop)
    assert stream.finish() == "" and (stream.stopped is None or stream.push(ids[0]) == "")


def test_a_character_and_a_stop_string_are_shown_whole_or_not_at_all(fixtures: Path):
    tokenizer = opened(fixtures, "llama-spm")
    stream = TextStream(tokenizer, stop=["END"])
    assert [stream.push(3 + byte) for byte in "é".encode()] == ["", "é"]
    assert [stream.push(3 + byte) for byte in b"xENxEND"] == ["x", "", "", "ENx", "", "", ""]
    assert (stream.stopped, stream.text, stream.finish()) == ("END", "éxENx", "")
    with pytest.raises(RequestError, match="empty"):
        TextStream(tokenizer, stop=[""])


def test_a_text_that_continues_keeps_its_first_space(fixtures: Path):
    tokenizer = opened(fixtures, "llama-spm")
    ids = tokenizer.encode("Paris", add_special=False)
    assert tokenizer.decode(ids) == "Paris" and tokenizer.decode(ids, continues=True) == " Paris"
