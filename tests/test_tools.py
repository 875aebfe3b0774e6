"""Calls are read as they are written, in any pieces; a template's family is the one that it writes."""

import json
import random
from typing import Any

import pytest
from tool_templates import FOREIGN, IGNORANT, TEMPLATES

from realm_jax.chat import ChatTemplate
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.tools import (
    FORMATS,
    CallFormat,
    CallReader,
    ToolCall,
    Toolset,
    ToolUse,
    find_tool_use,
    read_answer,
    read_tools,
)

LLAMA = next(format for format in FORMATS if format.name == "llama")
NAMES = ("get_weather", "f", "a-b.c")
PIECES = [
    "a",
    " ",
    "\n",
    "<tool_",
    "<",
    "[",
    "[TOOL",
    "{",
    '"',
    "\\",
    "}",
    "]",
    "é",
    "tool_call>",
    "</",
    "name",
]


def words(rng: random.Random, most: int = 8) -> str:
    """Text with all that could be taken for a call's parts."""
    return "".join(rng.choice(PIECES) for _ in range(rng.randint(0, most)))


def value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randint(0, 5 if depth < 3 else 3):
        case 0:
            return words(rng)
        case 1:
            return rng.choice([0, -1.5, True, None, "</tool_call>", '{"name": "f"}'])
        case 2 | 3:
            return rng.randrange(10**6)
        case 4:
            return [value(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {words(rng) + str(i): value(rng, depth + 1) for i in range(rng.randint(0, 3))}


def written(format: CallFormat, calls: list[ToolCall]) -> str:
    """An answer of these calls, as the family writes it."""
    objects = [
        f'{{"name": {json.dumps(call.name)}, "{format.arguments}": {call.arguments}}}{format.after}'
        for call in calls
    ]
    return (format.opens or "") + format.before + (format.between or "").join(objects) + format.last


def read(format: CallFormat, parts: list[str], constrained: bool) -> tuple[Any, ...]:
    """What a reader makes of these parts, one after the other."""
    reader = CallReader(format, NAMES, constrained=constrained)
    pieces = [piece for part in parts for piece in reader.push(part)]
    kinds: list[Any] = []
    for piece in pieces + reader.finish():
        name = type(piece).__name__
        text = piece.name if name == "Opening" else piece.text  # pyright: ignore[reportAttributeAccessIssue]
        if kinds and name != "Opening" and kinds[-1][0] == name:
            kinds[-1][1] += text
        else:
            kinds.append([name, text])
    return kinds, reader.has_calls, reader.is_cut


def divided(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(0, 9)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_written_calls_are_read_back_in_any_pieces(format: CallFormat):
    rng = random.Random(format.name)
    for _ in range(150):
        count = rng.randint(1, 3) if format.between is not None else 1
        calls = [
            ToolCall(rng.choice(NAMES), json.dumps({"a": value(rng)}, ensure_ascii=False))
            for _ in range(count)
        ]
        opening = words(rng) if format.opens is not None else ""
        opening = "" if format.opens is not None and format.opens in opening + "x" else opening
        behind = rng.choice(["", "\n", "\n\nafter."])
        text = opening + written(format, calls) + behind
        wanted: list[Any] = [["Content", opening.rstrip()]] if opening.strip() else []
        for call in calls:
            wanted += [["Opening", call.name], ["Arguments", call.arguments]]
        wanted += [["Content", behind.strip()]] if behind.strip() else []
        for constrained in (True, False):
            assert read(format, [text], constrained) == (wanted, True, False), text
            for _ in range(4):
                assert read(format, divided(rng, text), constrained) == (wanted, True, False), text
        cut = text[: rng.randrange(len(text))]  # what max_tokens leaves: whole and in pieces alike
        assert read(format, [cut], True) == read(format, divided(rng, cut), True)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_is_no_call_stays_text(format: CallFormat):
    """To the last character, in any pieces: unknown functions, broken JSON, markers in vain."""
    rng = random.Random(format.name)
    opens, key = format.opens or "", format.arguments
    texts = [
        "",
        "  ",
        "Hello.\n",
        f'{opens}{{"name": "unknown", "{key}": {{}}}}',
        f'{opens}{{"name": "f", "{key}": 3}}',
        f'{opens}{{"name": "f"}}',
        f'{opens}{{"name": "f", "{key}": {{"a": }}}} tail',
        f'{opens}{{"name": "f", "{key}": {{"a": 1',
        f"{opens} no object",
        f"{opens}[1, 2]",
        f'{opens}{{"a": ' + "[" * 5000 + "]" * 5000 + "}",
        f'{opens}{{"name": "f", "{key}": {{"a": {"9" * 5000}}}}}',
        f"a {opens[:-1]}",
    ]
    for text in texts + [words(rng, 30) for _ in range(300)]:
        wanted = [["Content", text]] if text else []
        for parts in ([text], divided(rng, text), list(text)):
            kinds, has_calls, is_cut = read(format, parts, constrained=False)
            assert (kinds, has_calls, is_cut) == (wanted, False, False), text
    assert read_answer(CallReader(format, NAMES, constrained=False), "Hello.\n") == ("Hello.\n", [])


def test_one_call_is_one_call():
    text = '{"name": "f", "parameters": {}}; {"name": "f", "parameters": {}}'
    for several, count in ((True, 2), (False, 1)):
        reader = CallReader(LLAMA, NAMES, constrained=False, several=several)
        _, calls = read_answer(reader, text)
        assert calls == [ToolCall("f", "{}")] * count


def test_a_cut_call_is_said():
    hermes = FORMATS[0]
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "b'
    kinds, has_calls, is_cut = read(hermes, list(text), constrained=True)
    assert kinds == [["Opening", "f"], ["Arguments", '{"a": "b']]
    assert (has_calls, is_cut) == (False, True)
    unknown = '<tool_call>\n{"name": "unknown", "arguments": {}}'
    assert read(hermes, [unknown], constrained=True) == ([["Content", unknown]], False, False)


def test_arguments_are_passed_on_as_they_come():
    reader = CallReader(FORMATS[0], NAMES, constrained=True)
    reader.push('<tool_call>\n{"name": "f", "arguments": {"a": "')
    assert [piece.text for piece in reader.push("bc")] == ["bc"]  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_templates_family_is_the_one_it_writes(name: str):
    template = ChatTemplate(TEMPLATES[name], name)
    use = find_tool_use([None, ChatTemplate(IGNORANT), template], "m.gguf")
    assert isinstance(use, ToolUse)
    assert (use.format.name, use.template, use.null_content) == (name, template, True)


def test_templates_that_take_no_tools_say_so():
    for template, words in ((IGNORANT, "ignores them"), (FOREIGN, "in none of the forms hermes, mistral")):
        found = find_tool_use([ChatTemplate(template)], "m.gguf")
        assert isinstance(found, UnsupportedError) and words in str(found) and "m.gguf" in str(found)
    found = find_tool_use([ChatTemplate("{{ messages[0].content }} probe_function")], "m.gguf")
    assert "ignores them" in str(found), "what stands there without tools as well says nothing"
    assert "no chat template" in str(find_tool_use([None], "m.gguf"))


@pytest.mark.parametrize("content", ["{{ m.content + '' }}", "{{ m.content }}"])
def test_a_template_that_needs_a_content_gets_an_empty_one(content: str):
    """Where it fails without, and where it would write None."""
    strict = TEMPLATES["hermes"].replace("assistant: {% for", f"assistant: {content}{{% for")
    use = find_tool_use([ChatTemplate(strict)], "m.gguf")
    assert isinstance(use, ToolUse) and not use.null_content
    calls = [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    text = use.render(messages, read_tools({"tools": [tool("f")]}))
    assert text.endswith(
        'assistant: <tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>assistant: '
    )
    fragile = ToolUse(ChatTemplate("{{ tools[0].function.parameters.properties.a.b.c }}"), use.format, True)
    with pytest.raises(RequestError, match="cannot be shown to the model"):
        fragile.render(messages, read_tools({"tools": [tool("f")]}))


def tool(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def deep(levels: int) -> Any:
    return {"a": deep(levels - 1)} if levels else {}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tools": {}}, "tools is {}; it must be a list"),
        ({"tools": [1]}, r"tools\[0\] is 1"),
        ({"tools": [tool()] * 129}, "tools has 129 entries; the limit is 128"),
        ({"tools": [{"type": "code"}]}, r"tools\[0\].type is 'code'"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].function is missing"),
        ({"tools": [{**tool(), "more": 1}]}, r"tools\[0\] has 'more'"),
        ({"tools": [tool(more=1)]}, r"tools\[0\].function has 'more'"),
        ({"tools": [tool(None)]}, r"tools\[0\].function.name is missing"),
        ({"tools": [tool("")]}, r"tools\[0\].function.name is ''"),
        ({"tools": [tool("a b")]}, r"tools\[0\].function.name is 'a b'"),
        ({"tools": [tool("a" * 65)]}, r"tools\[0\].function.name is"),
        ({"tools": [tool('f"}')]}, r"tools\[0\].function.name is"),
        ({"tools": [tool("é")]}, r"tools\[0\].function.name is"),
        ({"tools": [tool(), tool()]}, "tools has two functions 'f'"),
        ({"tools": [tool(description=3)]}, r"tools\[0\].function.description must be"),
        ({"tools": [tool(description="x" * 8193)]}, "at most 8,192"),
        ({"tools": [tool(strict=1)]}, r"tools\[0\].function.strict is 1"),
        ({"tools": [tool(parameters=[])]}, r"tools\[0\].function.parameters is \[\]"),
        ({"tools": [tool(parameters={"type": "string"})]}, r"parameters is .*type \"object\""),
        ({"tools": [tool(parameters={"properties": 1})]}, "parameters.properties must be an object"),
        ({"tools": [tool(parameters=deep(40))]}, r"tools\[0\] is nested more than 32 deep"),
        ({"tools": [tool(parameters={"a": "x" * 46_000})]}, "bytes as JSON; the limit is 45,056"),
        ({"tools": [tool(parameters={"a": float("nan")})]}, "tools cannot be written as JSON"),
        ({"tools": [tool()], "tool_choice": "always"}, "tool_choice is 'always'"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice is"),
        ({"tools": [tool()], "tool_choice": tool("g")}, "tool_choice names 'g'; tools has f"),
        ({"tool_choice": "required"}, "tool_choice is 'required', and there are no tools"),
        ({"tools": [tool()], "parallel_tool_calls": 1}, "parallel_tool_calls is 1"),
    ],
)
def test_hostile_definitions_are_named(body: dict[str, Any], named: str):
    with pytest.raises(RequestError, match=named):
        read_tools(body)


def test_choices():
    tools = {"tools": [tool("f"), tool("g")]}

    def chosen(**more: Any) -> Any:
        found = read_tools(tools | more)
        return found if found is None else (found.forced, found.several)

    assert chosen() == chosen(tool_choice="auto") == (None, True)
    assert chosen(tool_choice="required") == (("f", "g"), True)
    assert chosen(tool_choice=tool("g")) == (("g",), False)
    assert chosen(parallel_tool_calls=False) == (None, False)
    assert chosen(tool_choice="none") is read_tools({"tools": []}) is read_tools({}) is None
    named = read_tools(tools | {"tool_choice": tool("g")})
    assert isinstance(named, Toolset) and [each.name for each in named.callable] == ["g"]
    assert named.names == {"f", "g"}
