"""OpenAI's request bodies: JSON objects to tasks. `answers` has the way back."""

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams
from realm_jax.serving.calling import Calling
from realm_jax.serving.request import chosen_adapters
from realm_jax.structured import read_structured_output
from realm_jax.tools import Toolset, read_tools

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "max_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "prompt_logprobs",
    "n",
)
FORM = ("response_format", "structured_outputs")
IGNORED = ("model", "user", "metadata", "store")  # they change no answer, unless an adapter is named so
HARMLESS = {
    "stream": False,
    "suffix": None,
    "best_of": 1,
    "service_tier": "auto",
}
OWN = {COMPLETIONS: ("prompt", "echo"), CHAT: ("messages", "max_completion_tokens", "top_logprobs")}
OWN[CHAT] += ("chat_template_kwargs", "tools", "tool_choice", "parallel_tool_calls")
TEMPLATE_VARIABLES = {"enable_thinking": bool, "thinking": bool, "reasoning_effort": str, "date_string": str}
"""What a request may say to the chat template beside its messages; a text has up to 100 characters."""


def known_fields(url: str) -> frozenset[str]:
    """The fields that a body to the URL may have."""
    return frozenset({"lora", *SAMPLING, *FORM, *IGNORED, *HARMLESS, *OWN[url], "logprobs", "logit_bias"})


@dataclass(frozen=True)
class Task:
    """What a body asks for; `url` decides the form of the answer."""

    url: str
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    params: SamplingParams
    echo: bool = False  # the answer begins with the prompt
    lora: object = None  # as `chosen_adapters` takes it
    model: str | None = None
    template_variables: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    tools: Toolset | None = None
    calling: Calling | None = None  # how the model calls them, once it is known which one answers

    def adapters(self, loaded: Container[str]) -> tuple[tuple[str, float], ...]:
        """Those that `lora` asks for, or else `model`, where it is the name of one that is loaded."""
        named = self.model if self.model is not None and self.model in loaded else None
        return chosen_adapters(named if self.lora is None else self.lora)

    def prompt_ids(self, llm: LLM) -> list[int]:
        """The tokens to continue. Raises RequestError for messages that the template refuses."""
        if self.messages is not None:
            return llm.chat_prompt(self.messages, tools=self.tools, **self.template_variables)
        return llm.prompt_ids(self.prompt or [])

    def fitted(self, llm: LLM) -> "Task":
        """The task as this model does it: with tools, the answer has the form of its family's calls.

        Raises UnsupportedError for tools where the chat template ignores them.
        """
        if self.tools is None:
            return self
        calling = Calling.of(self.tools, llm)
        return replace(self, params=calling.params(self.params), calling=calling)


def read_task(line: Mapping[str, Any]) -> Task:
    """The task of a batch line. Raises RequestError or UnsupportedError naming the field."""
    if "url" not in line and "body" not in line:
        fields = {key: value for key, value in line.items() if key not in ("id", "custom_id")}
        return read_body(CHAT if "messages" in fields else COMPLETIONS, fields)
    if line.get("method", "POST") != "POST":
        raise RequestError(f"method is {line['method']!r}; it must be POST")
    if not isinstance(body := line.get("body"), dict):
        raise RequestError("body is missing or no JSON object")
    return read_body(line.get("url"), body)


def read_body(url: object, body: Mapping[str, Any]) -> Task:
    """The task of a request body to one of the two URLs."""
    if url not in (COMPLETIONS, CHAT):
        raise UnsupportedError(f"url is {url!r}; supported: {COMPLETIONS}, {CHAT}")
    known = known_fields(str(url))
    if unknown := sorted(body.keys() - known):
        raise UnsupportedError(f"unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    for name, harmless in HARMLESS.items():
        if body.get(name, harmless) not in (harmless, None):
            raise UnsupportedError(f"{name} is {str(body[name])[:60]!r}, which is not served; leave it out")
    messages = _messages(body["messages"]) if url == CHAT and "messages" in body else None
    prompt = checked_prompt(body.get("prompt")) if url == COMPLETIONS else None
    if url == CHAT and messages is None:
        raise RequestError("messages is missing")
    if not isinstance(echo := body.get("echo") or False, bool):
        raise RequestError(f"echo is {echo!r}; it must be true or false")
    chosen_adapters(body.get("lora"))  # refused here if it is none
    model = body.get("model") if isinstance(body.get("model"), str) else None
    variables = template_variables(body.get("chat_template_kwargs"))
    params = _params(url == CHAT, body)
    tools = read_tools(body) if url == CHAT else None
    if tools is not None and params.structured_output is not None:
        raise RequestError(
            "response_format is given, and tools are; leave one out, or set tool_choice to none"
        )
    return Task(str(url), prompt, messages, params, echo, body.get("lora"), model, variables, tools)


def template_variables(given: object) -> dict[str, Any]:
    """`chat_template_kwargs`, of which only known ones are let through. Raises RequestError for others."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise RequestError("chat_template_kwargs must be an object")
    for name, value in given.items():
        kind = TEMPLATE_VARIABLES.get(name)
        if kind is None:
            known = ", ".join(TEMPLATE_VARIABLES)
            raise RequestError(f"chat_template_kwargs has {name[:60]!r}; known: {known}")
        if not isinstance(value, kind) or (isinstance(value, str) and len(value) > 100):
            what = "true or false" if kind is bool else "a text of at most 100 characters"
            raise RequestError(f"chat_template_kwargs.{name} must be {what}")
    return dict(given)


def _params(is_chat: bool, body: Mapping[str, Any]) -> SamplingParams:
    given = {key: body[key] for key in SAMPLING if body.get(key) is not None}
    if is_chat:
        if body.get("max_completion_tokens") is not None:
            given["max_tokens"] = body["max_completion_tokens"]
        if body.get("logprobs") not in (None, False, True):
            raise RequestError(f"logprobs is {body['logprobs']!r}; it must be true or false")
        if body.get("top_logprobs") and not body.get("logprobs"):
            raise RequestError("top_logprobs needs logprobs to be true")
        if body.get("logprobs"):
            given["logprobs"] = body.get("top_logprobs") or 0
    elif body.get("logprobs") is not None:
        given["logprobs"] = body["logprobs"]
        if body.get("echo"):
            given["prompt_logprobs"] = body["logprobs"]
    if (bias := body.get("logit_bias")) is not None:
        if not isinstance(bias, dict) or not all(str(token).isdecimal() for token in bias):
            raise RequestError("logit_bias must be an object of token ids and numbers")
        given["logit_bias"] = {int(token): value for token, value in bias.items()}
    return SamplingParams(**given, structured_output=read_structured_output(body))


def checked_prompt(value: object, name: str = "prompt") -> str | list[int]:
    """The prompt. Raises RequestError for what is neither text nor token ids."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise RequestError(f"{name} must be a string or a list of token ids")


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RequestError("messages must be a list of objects")
    return value
