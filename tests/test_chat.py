"""A template renders as Jinja2 renders it; a hostile one ends in one line, soon, and reaches nothing."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from realm_jax import gguf
from realm_jax.chat import ChatTemplate, sandbox
from realm_jax.chat.messages import checked
from realm_jax.chat.template import KNOWN_GOOD
from realm_jax.errors import ModelFileError, RequestError, UnsupportedError

KEY = "tokenizer.chat_template"
HELLO = [{"role": "user", "content": "Hello"}]
# The template of SmolLM2 Instruct, the default model.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(template: str, messages: Any = HELLO, **variables: Any) -> str:
    return ChatTemplate(template, bos_token="<s>", eos_token="</s>").render(messages, **variables)


def worker_pid() -> int:
    process = sandbox._sandbox._process
    assert process is not None
    return process.pid


def test_the_default_template_renders_the_golden_texts(fixtures: Path):
    template = ChatTemplate(SMOLLM2)
    assert template.trusted
    for file in ("expected-Q4_1.json", "expected-Q4_1-dequant-f32.json"):
        chat = json.loads((fixtures / "smollm2" / file).read_text())["chat"]
        assert template.render(chat["messages"]) == chat["jinja"]["rendered"]
        # With a system message of its own, the template adds none.
        own = [{"role": "system", "content": "S"}, *chat["messages"]]
        system, separator, rest = template.render(own).partition("<|im_end|>\n")
        assert system == "<|im_start|>system\nS" and separator
        assert rest == chat["builtin"]["rendered"]


@pytest.mark.parametrize("name", ["qwen2", "phi-3"])
def test_a_template_says_the_same_here_and_in_the_worker(fixtures: Path, name: str):
    metadata = gguf.open(fixtures / "tokenizer" / f"ggml-vocab-{name}.gguf").metadata
    here = ChatTemplate.require(metadata, name, bos_token="<s>")
    there = ChatTemplate(here.template + "{# read by nobody #}", bos_token="<s>")
    assert (here.trusted, there.trusted) == (True, False)
    messages = [*HELLO, {"role": "assistant", "content": "Hé\ud800"}, {"role": "user", "content": "<b>'\"&"}]
    for prompt in (True, False):
        text = here.render(messages, add_generation_prompt=prompt)
        assert text == there.render(messages, add_generation_prompt=prompt)
        assert "<b>'\"&" in text


def test_known_good_templates_are_named_by_hash():
    assert len(KNOWN_GOOD) == 3 and all(len(digest) == 64 for digest in KNOWN_GOOD)


def test_what_templates_may_use():
    assert render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ unk_token }}") == "<s>Hello</s>"
    assert render("  {% if true %}\n x\n  {% endif %}\ny") == " x\ny", "trim_blocks, lstrip_blocks"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}{{ 'b' }}{% endgeneration %}c") == "abc"
    assert render("{{ {'a': '<é>'} | tojson }}|{{ [1] | tojson(indent=1) }}") == '{"a": "<é>"}|[\n 1\n]'
    assert render("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert (
        render("{{ tools }}{{ x }}{{ add_generation_prompt }}", x=3, add_generation_prompt=False)
        == "None3False"
    )
    assert render("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}") == "2"


def test_templates_of_a_file_are_chosen_by_name():
    metadata = {KEY: "default", f"{KEY}.tool_use": "tools"}
    template = ChatTemplate.from_metadata(metadata, "m.gguf")
    assert template is not None and template.render(HELLO) == "default"
    assert ChatTemplate.require(metadata, name="tool_use").render(HELLO) == "tools"
    with pytest.raises(RequestError, match=r"chat template is 'rag'; m\.gguf has tool_use"):
        ChatTemplate.from_metadata(metadata, "m.gguf", name="rag")
    with pytest.raises(ModelFileError, match=r"m.gguf: tokenizer.chat_template is of type int"):
        ChatTemplate.from_metadata({KEY: 3}, "m.gguf")
    assert ChatTemplate.from_metadata({}) is None
    with pytest.raises(UnsupportedError, match=r"m.gguf has no chat template .* --raw"):
        ChatTemplate.require({}, "m.gguf")


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages must be a list of at least one"),
        ("hello", "messages must be a list"),
        (["hello"], r"messages\[0\] is of type str"),
        ([{"content": "x"}], r"messages\[0\].role is missing"),
        ([*HELLO, {"role": 3, "content": "x"}], r"messages\[1\].role is 3"),
        ([{"role": "", "content": "x"}], r"messages\[0\].role is ''"),
        ([{"role": "user"}], r"messages\[0\].content is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content is 3"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is 'x'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"content\[0\].type is 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text is missing"),
    ],
)
def test_bad_messages_are_named(messages: Any, named: str):
    with pytest.raises(RequestError, match=named):
        checked(messages)


def test_values_that_json_lacks_are_named():
    with pytest.raises(RequestError, match=r"^messages cannot be written as JSON: "):
        render("", [{"role": "user", "content": "x", "extra": {1, 2}}])
    with pytest.raises(RequestError, match=r"^tools cannot be written as JSON: "):
        render("", tools=[print])


def test_contents_in_parts_are_joined_and_tool_calls_need_none():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"
    calls = [{"function": {"name": "f", "arguments": '{"a": 1}'}}]
    said = "{{ messages[0].tool_calls[0].function | tojson }}{{ messages[0].content }}"
    call = {"role": "assistant", "content": None, "tool_calls": calls}
    assert render(said, [call]) == '{"name": "f", "arguments": {"a": 1}}None'
    none = {"role": "assistant", "content": "x", "tool_calls": []}
    assert render("{{ 'tool_calls' in messages[0] }}", [none]) == "False", "templates ask by the name"


def test_a_template_that_refuses_blames_the_request():
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate, please"):
        render("{{ raise_exception('roles must\n alternate, please') }}")


# Templates nobody has read


BOUNDED = {
    "much text": "{{ 'a' * 10**9 }}",
    "much text in parts": "{% for i in range(99999) %}{{ 'a' * 10**4 }}{% endfor %}",
    "a power": "{{ 2 ** (10 ** 9) }}",
    "a power at run time": "{% set n = messages | length %}{{ (n + 1) ** (10 ** 9) }}",
    "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "doubled lists": "{% set n = namespace(a=[1]) %}"
    "{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "padding": "{{ '%1000000000d' % 1 }}",
    "a filter's padding": "{{ 'x' | center(10**9) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "time": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a syntax error": "{% for x in %}",
    "an unknown tag": "{% include '/etc/passwd' %}",
    "an unknown name": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("template", BOUNDED.values(), ids=BOUNDED)
def test_a_hostile_template_ends_in_one_line_soon(template: str):
    start = time.monotonic()
    with pytest.raises(
        ModelFileError, match=r"^metadata: the chat template .* \(--raw does without it\)$"
    ) as error:
        render(template)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.monotonic() - start < 20, (
        "2 s for the template, the rest for starting a process on a busy machine"
    )
    assert render("{{ messages[0].content }}") == "Hello", "the next template finds a worker"


@pytest.mark.parametrize("name", ["sandbox-escape", "huge-range", "infinite-macro"])
def test_the_hostile_files_end_in_one_line(fixtures: Path, name: str):
    metadata = gguf.open(fixtures / "bad" / f"template-{name}.gguf").metadata
    with pytest.raises(ModelFileError) as error:
        ChatTemplate.require(metadata, name).render(HELLO)
    assert str(error.value).startswith(f"{name}: the chat template ") and "\n" not in str(error.value)


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': ''}) }}",
    "{{ ('%s' | format(''))['__class__'] }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['sys'] }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__.os }}",
    "{{ lipsum.__globals__ }}",
    "{{ messages.append({}) }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{% for m in messages %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_reaches_python(template: str):
    """Either an error, or nothing: an undefined value prints as the empty text."""
    try:
        text = render(template)
    except ModelFileError as error:
        assert "\n" not in str(error)
    else:
        assert text == ""


def test_the_worker_stays_between_templates_and_is_replaced_after_a_breach():
    render("a")
    first = worker_pid()
    render("b")
    assert worker_pid() == first
    with pytest.raises(RequestError):
        render("{{ raise_exception('no') }}")
    assert worker_pid() == first, "a refusal is no breach"
    with pytest.raises(ModelFileError):
        render("{{ 2 ** (10 ** 9) }}")
    render("c")
    assert worker_pid() != first


def test_a_worker_that_died_is_replaced():
    render("a")
    os.kill(worker_pid(), 9)
    time.sleep(0.1)
    assert render("b") == "b"


def test_an_interrupted_answer_is_not_taken_for_the_next(monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    render("a")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_answer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render("old")
    assert render("new") == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_sees_no_secrets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret-of-a-user")
    sandbox._sandbox.close()
    render("a")
    environment = Path(f"/proc/{worker_pid()}/environ").read_bytes()
    assert b"PYTHONPATH=" in environment and b"secret" not in environment


def test_the_worker_is_light_and_the_process_ends_quietly():
    program = (
        "import sys\n"
        "import realm_jax.chat.template_worker\n"
        "assert not {'jax', 'numpy', 'tokenizers'} & set(sys.modules)\n"
        "from realm_jax.chat import ChatTemplate\n"
        "print(ChatTemplate('{{ messages[0].content }}').render([{'role': 'user', 'content': 'x'}]))\n"
    )
    root = Path(sandbox.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x\n", "")
