"""Grammars before any model: what is refused, in bounded time, and what vocabularies make of the others."""

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from schemas import conforms, random_schema

from realm_jax import RequestError, StructuredOutput, UnsupportedError
from realm_jax.grammars import Grammars, Verdict, compiler
from realm_jax.serving.bodies import CHAT, read_body
from realm_jax.tokenizer import Tokenizer


def test_the_checker_checks() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]}
    assert conforms({"a": None}, schema) and not conforms({}, schema) and not conforms({"a": 0}, schema)
    assert not conforms({"a": None, "b": 1}, schema) and not conforms([], schema)
    assert conforms(5, {"type": "integer", "minimum": 5, "maximum": 6}) and not conforms(
        5, {"type": "boolean"}
    )


HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"regex": "(a"}, "regex cannot be used: .*unclosed group"),
    ({"regex": r"(?=a)b"}, "regex cannot be used: .*look-around"),
    (
        {"json_schema": {"type": "integer", "multipleOf": 1000003, "maximum": 10**14}},
        "json_schema .*(fuel|seconds)",
    ),
    ({"regex": "a" * 70_000}, "regex has 70,000 bytes; the limit is 65,536"),
    ({"json_schema": {"allOf": [{"pattern": f"a{i}"} for i in range(30)], "type": "string"}}, "seconds"),
    ({"json_schema": {"type": "array", "uniqueItems": True}}, "json_schema cannot be used: .*uniqueItems"),
    ({"json_schema": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "Unsatisfiable"),
    ({"json_schema": {"$ref": "http://example.com/x"}}, "json_schema cannot be used"),
    ({"json_schema": '{"items":' * 9999 + "{}" + "}" * 9999}, "json_schema is no JSON|nested more than 64"),
    ({"json_schema": '{"items":' * 70 + "{}" + "}" * 70}, "json_schema is nested more than 64 deep"),
    ({"json_schema": "{"}, "json_schema is no JSON"),
    ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar cannot be used: .*nested"),
    (
        {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000))},
        "grammar cannot be used",
    ),
    ({"grammar": 'start: x\nx: x "a"'}, "grammar cannot be used: nothing matches it"),
    ({"grammar": "root ::= (["}, "grammar cannot be used: .*GBNF"),
    ({"choice": []}, "choice is"),
    ({"choice": ["a"] * 1001}, "choice has 1,001 texts; the limit is 1,000"),
    ({}, "has none of json_object, json_schema, regex"),
    ({"regex": "a", "json_object": True}, "has json_object, regex, and takes one of"),
]


def test_what_cannot_be_used_is_refused_by_name_in_time(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it would take."""
    monkeypatch.setattr(compiler, "SECONDS", 1.5)
    grammars = Grammars(Tokenizer.from_gguf(tiny_model), 320)
    start = time.perf_counter()
    for fields, message in HOSTILE:
        with pytest.raises(RequestError, match=message):
            grammars.compile(StructuredOutput(**fields))
    assert time.perf_counter() - start < 90
    grammars.compile(StructuredOutput(regex="a+"))  # others are served as ever
    start = time.perf_counter()
    with pytest.raises(RequestError, match="seconds"):  # known by now: it is not tried again
        grammars.compile(StructuredOutput(**HOSTILE[4][0]))
    assert time.perf_counter() - start < 1
    grammars.close()


def test_a_missing_package_is_named(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    grammars = Grammars(Tokenizer.from_gguf(tiny_model), 320)
    with pytest.raises(UnsupportedError, match=r"needs the package llguidance: pip install"):
        grammars.compile(StructuredOutput(json_object=True))


def test_few_grammars_are_kept(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "KEPT", 2)
    grammars = Grammars(Tokenizer.from_gguf(tiny_model), 320)
    forms = [StructuredOutput(regex=each) for each in ("a", "b", "a", "c", "a")]
    found = [grammars.compile(form) for form in forms]
    assert found[0] is found[2] is found[4] and len(grammars._known) == 2
    grammars.close()


@pytest.mark.parametrize("name", ["llama-spm", "gpt-2", "starcoder"])
def test_any_vocabulary_spells_the_form(fixtures: Path, name: str) -> None:
    """A walk at random through the masks: the tokens' texts together are what the schema accepts."""
    tokenizer = Tokenizer.from_gguf(fixtures / "tokenizer" / f"ggml-vocab-{name}.gguf")
    grammars = Grammars(tokenizer, tokenizer.vocab_size - 1)  # a model that lacks the last token
    rng, draw = random.Random(7), np.random.default_rng(7)
    for _ in range(15):
        schema = random_schema(rng)
        matcher, ids = grammars.compile(StructuredOutput(json_schema=schema)).matcher(), []
        while matcher.verdict is Verdict.GOES_ON:
            allowed = np.flatnonzero(np.unpackbits(matcher.allowed.view(np.uint8), bitorder="little"))
            allowed = allowed[~np.isin(allowed, list(tokenizer.eog_ids))]
            assert allowed.max() < tokenizer.vocab_size - 1
            assert not any(tokenizer.is_special(int(i)) for i in allowed)
            ids.append(int(draw.choice(allowed)))
            matcher.advance(ids[-1])
        assert matcher.verdict is Verdict.COMPLETE
        text = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert conforms(json.loads(text), schema), text
    grammars.close()


def test_a_text_that_continues_has_no_space_before_it(fixtures: Path) -> None:
    tokenizer = Tokenizer.from_gguf(fixtures / "tokenizer" / "ggml-vocab-llama-spm.gguf")
    for text in ("name", " name", '{"a": 1}', "ワ"):
        ids = tokenizer.encode(text, add_special=False, continues=True)
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert ids != tokenizer.encode(text, add_special=False)


SCHEMA = {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_object=True)),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "strict": True}}},
            StructuredOutput(json_schema=SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, StructuredOutput(json_schema=SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"choice": ["a"]}}, StructuredOutput(choice=("a",))),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs: .* takes one of"),
        ({"structured_outputs": {"xml": "a"}}, "structured_outputs must be an object with one of json"),
        ({"response_format": {"type": "yaml"}}, "response_format is .*yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema must be an object"),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "both given; leave one out",
        ),
    ],
)
def test_bodies_say_the_form(body: dict[str, Any], expected: StructuredOutput | str | None) -> None:
    whole = {"messages": [{"role": "user", "content": "Hi"}], **body}
    if isinstance(expected, str):
        with pytest.raises(RequestError, match=expected):
            read_body(CHAT, whole)
    else:
        params = read_body(CHAT, whole).params
        assert params.structured_output == expected and isinstance(hash(params), int)
