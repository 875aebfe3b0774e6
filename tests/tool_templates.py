"""Chat templates that take tools, one of each family: what the models' own do, in few lines."""

_TOOLS = "{% if tools %}tools: {% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
_CALL = '{"name": "{{ c.function.name }}", "NAME": {{ c.function.arguments | tojson }}}'
_REST = "{% else %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
_PROMPT = "{% if add_generation_prompt %}assistant: {% endif %}"


def _template(before: str, call: str, after: str, separator: str = "") -> str:
    calls = (
        f"{{% for c in m.tool_calls %}}{call}{{% if not loop.last %}}{separator}{{% endif %}}{{% endfor %}}"
    )
    said = "{% if m.tool_calls %}assistant: " + f"{before}{calls}{after}\n"
    return _TOOLS + "{% for m in messages %}" + said + _REST + _PROMPT


def _call(name: str = "arguments") -> str:
    return _CALL.replace("NAME", name)


TEMPLATES = {
    "hermes": _template("", f"<tool_call>\n{_call()}\n</tool_call>", "", "\n"),
    "mistral": _template("[TOOL_CALLS][", _call(), "]", ", "),
    "apriel": _template("<tool_calls>[", _call(), "]</tool_calls>", ", "),
    "nemotron": _template("<TOOLCALL>[", _call(), "]</TOOLCALL>", ", "),
    "llama": _template("", _call("parameters"), ""),
    "generic": _template("", _call(), ""),
}
"""By the name of the format that they write."""

IGNORANT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + _PROMPT
FOREIGN = _template("", "<function={{ c.function.name }}>{{ c.function.arguments | tojson }}</function>", "")
