"""OpenAI's request and response bodies: JSON objects to tasks, and outputs back to JSON objects."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.llm import LLM
from realm_jax.params import SamplingParams
from realm_jax.serving.request import GenerationOutput, TokenLogprob, chosen_adapters
from realm_jax.structured import read_structured_output
from realm_jax.tokenizer import Tokenizer

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
    "prompt_logprobs",
    "n",
)
FORM = ("response_format", "structured_outputs")
IGNORED = ("model", "user", "metadata", "store")  # they change no answer, unless an adapter is named so
HARMLESS = {"stream": False, "suffix": None, "best_of": 1, "tools": None, "tool_choice": None}


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

    def adapters(self, loaded: Container[str]) -> tuple[tuple[str, float], ...]:
        """Those that `lora` asks for, or else `model`, where it is the name of one that is loaded."""
        named = self.model if self.model is not None and self.model in loaded else None
        return chosen_adapters(named if self.lora is None else self.lora)

    def prompt_ids(self, llm: LLM) -> list[int]:
        """The tokens to continue. Raises RequestError for messages that the template refuses."""
        if self.messages is not None:
            return llm.chat_prompt(self.messages)
        return llm.prompt_ids(self.prompt or [])


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
    own = ("messages", "max_completion_tokens", "top_logprobs") if url == CHAT else ("prompt", "echo")
    known = {"lora", *SAMPLING, *FORM, *IGNORED, *HARMLESS, *own, "logprobs", "logit_bias"}
    if unknown := sorted(body.keys() - known):
        raise UnsupportedError(f"unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    for field, harmless in HARMLESS.items():
        if body.get(field, harmless) not in (harmless, None):
            raise UnsupportedError(f"{field} is {body[field]!r}; leave it out")
    messages = _messages(body["messages"]) if url == CHAT and "messages" in body else None
    prompt = _prompt(body.get("prompt")) if url == COMPLETIONS else None
    if url == CHAT and messages is None:
        raise RequestError("messages is missing")
    if not isinstance(echo := body.get("echo") or False, bool):
        raise RequestError(f"echo is {echo!r}; it must be true or false")
    chosen_adapters(body.get("lora"))  # refused here if it is none
    model = body.get("model") if isinstance(body.get("model"), str) else None
    return Task(str(url), prompt, messages, _params(url == CHAT, body), echo, body.get("lora"), model)


def _params(is_chat: bool, body: Mapping[str, Any]) -> SamplingParams:
    given = {key: body[key] for key in SAMPLING if body.get(key) is not None}
    if is_chat:
        if body.get("max_completion_tokens") is not None:
            given["max_tokens"] = body["max_completion_tokens"]
        if body.get("logprobs") not in (None, False, True):
            raise RequestError(f"logprobs is {body['logprobs']!r}; it must be true or false")
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


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return value
    raise RequestError("prompt must be a string or a list of token ids")


def _messages(value: object) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RequestError("messages must be a list of objects")
    return value


def response_body(task: Task, outputs: list[GenerationOutput], llm: LLM) -> dict[str, Any]:
    """The body that answers a task, all samples of it."""
    ordered = sorted(outputs, key=lambda output: output.sample_index)
    choice = _chat_choice if task.url == CHAT else _echoed_choice if task.echo else _completion_choice
    prompt_tokens = ordered[0].usage.prompt_tokens
    completion_tokens = sum(output.usage.completion_tokens for output in ordered)
    return {
        "object": "chat.completion" if task.url == CHAT else "text_completion",
        "model": llm.model.path.name,
        "choices": [choice(output, llm.tokenizer) for output in ordered],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _completion_choice(output: GenerationOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    text_of = tokenizer.token_text
    choice: dict[str, Any] = {
        "index": output.sample_index,
        "text": output.text,
        "logprobs": None,
        "finish_reason": str(output.finish_reason),
    }
    if output.logprobs is not None:
        choice["logprobs"] = {
            "tokens": [text_of(each["token_id"]) for each in output.logprobs],
            "token_logprobs": [each["logprob"] for each in output.logprobs],
            "top_logprobs": [_top(each, text_of) for each in output.logprobs],
        }
    if output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = output.prompt_logprobs
    return choice


def _echoed_choice(output: GenerationOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion with its prompt before it, as OpenAI's `echo` has it."""
    choice = _completion_choice(output, tokenizer)
    choice["text"] = tokenizer.decode(output.prompt_token_ids) + choice["text"]
    prompt = choice.pop("prompt_logprobs", None)
    if (known := choice["logprobs"]) is not None and prompt is not None:
        text_of = tokenizer.token_text
        known["tokens"] = [text_of(i) for i in output.prompt_token_ids] + known["tokens"]
        values = [None if each is None else each["logprob"] for each in prompt]
        known["token_logprobs"] = values + known["token_logprobs"]
        tops = [None if each is None else _top(each, text_of) for each in prompt]
        known["top_logprobs"] = tops + known["top_logprobs"]
    return choice


def _top(each: TokenLogprob, text_of: Callable[[int], str]) -> dict[str, float]:
    return {text_of(int(token)): value for token, value in each["top"]}


def _chat_choice(output: GenerationOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    text_of = tokenizer.token_text

    def entry(token: int, value: float) -> dict[str, Any]:
        text = text_of(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "replace"))}

    def with_top(each: TokenLogprob) -> dict[str, Any]:
        top = [entry(int(token), value) for token, value in each["top"]]
        return {**entry(each["token_id"], each["logprob"]), "top_logprobs": top}

    return {
        "index": output.sample_index,
        "message": {"role": "assistant", "content": output.text},
        "logprobs": None if output.logprobs is None else {"content": [with_top(e) for e in output.logprobs]},
        "finish_reason": str(output.finish_reason),
    }
