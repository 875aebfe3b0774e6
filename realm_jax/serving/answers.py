"""OpenAI's response bodies: outputs of tasks as JSON objects, whole or in the pieces of a stream."""

from collections.abc import Iterable, Sequence
from typing import Any

from realm_jax.serving.bodies import CHAT, Task
from realm_jax.serving.calling import CallStream
from realm_jax.serving.request import GenerationOutput, TextDelta, TokenLogprob
from realm_jax.tokenizer import Tokenizer

LEAST = -9999.0
"""What stands for the logarithm of zero, which JSON cannot write; vLLM's number."""


def response_body(
    task: Task, outputs: Sequence[GenerationOutput], tokenizer: Tokenizer, model: str
) -> dict[str, Any]:
    """The body that answers a task, all samples of it."""
    return {
        "object": "chat.completion" if task.url == CHAT else "text_completion",
        "model": model,
        "choices": choices(task, outputs, tokenizer),
        "usage": usage(outputs),
    }


def usage(outputs: Iterable[GenerationOutput]) -> dict[str, int]:
    """Tokens in and out; a prompt counts once, however many samples it has."""
    outputs = list(outputs)
    prompt_tokens = sum({o.request_id: o.usage.prompt_tokens for o in outputs}.values())
    completion_tokens = sum(o.usage.completion_tokens for o in outputs)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def choices(
    task: Task, outputs: Sequence[GenerationOutput], tokenizer: Tokenizer, first: int = 0
) -> list[dict[str, Any]]:
    """The samples of a task, the first of them numbered `first`."""
    choice = _chat_choice if task.url == CHAT else _completion_choice
    ordered = sorted(outputs, key=lambda output: output.sample_index)
    return [{"index": first + output.sample_index, **choice(task, output, tokenizer)} for output in ordered]


def _completion_choice(task: Task, output: GenerationOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    text, known = output.text, output.logprobs
    entries: list[TokenLogprob | int] | None = None if known is None else [*known]
    choice: dict[str, Any] = {}
    if task.echo:  # the prompt stands before what was said, and is scored as that is
        text = echoed(task, output.prompt_token_ids, tokenizer) + text
        if entries is not None and output.prompt_logprobs is not None:
            pairs = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            entries = [token if each is None else each for token, each in pairs] + entries
    elif output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = output.prompt_logprobs
    return {
        "text": text,
        "logprobs": None if entries is None else completion_logprobs(entries, tokenizer)[0],
        "finish_reason": str(output.finish_reason),
    } | choice


def _chat_choice(task: Task, output: GenerationOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    said, reason = {"content": output.text}, str(output.finish_reason)
    if task.calling is not None:
        said, reason = task.calling.answer(output)
    choice: dict[str, Any] = {
        "message": {"role": "assistant"} | said,
        "logprobs": None if output.logprobs is None else chat_logprobs(output.logprobs, tokenizer),
        "finish_reason": reason,
    }
    if output.prompt_logprobs is not None:
        choice["prompt_logprobs"] = output.prompt_logprobs
    return choice


def echoed(task: Task, prompt_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The prompt as it was given, or the text of its token ids."""
    return task.prompt if isinstance(task.prompt, str) else tokenizer.decode(prompt_ids)


def chunk_choice(
    task: Task,
    delta: TextDelta,
    tokenizer: Tokenizer,
    *,
    index: int,
    offset: int,
    is_first: bool,
    calls: CallStream | None = None,
) -> tuple[dict[str, Any], int]:
    """A piece of a choice, and where in the text of its tokens the next one begins.

    is_first: whether it opens the choice, and says a message's role. calls: what has read the delta, where
    the answer may have calls.
    """
    reason = None if delta.output is None else str(delta.output.finish_reason)
    choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": reason}
    if task.url == CHAT:
        said = {"content": delta.text} if calls is None else calls.said
        choice["delta"] = ({"role": "assistant"} if is_first else {}) | said
        if calls is not None and delta.output is not None:
            choice["finish_reason"] = calls.reason(delta.output)
        if delta.logprobs is not None:
            choice["logprobs"] = chat_logprobs(delta.logprobs, tokenizer)
        return choice, offset
    choice["text"] = delta.text
    if delta.logprobs is not None:
        choice["logprobs"], offset = completion_logprobs(delta.logprobs, tokenizer, offset)
    return choice, offset


def completion_logprobs(
    entries: Sequence[TokenLogprob | int], tokenizer: Tokenizer, offset: int = 0
) -> tuple[dict[str, Any], int]:
    """The lists of a completion, and the offset that follows; a bare token id has nothing before it."""
    found: dict[str, list[Any]] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for each in entries:
        token = each if isinstance(each, int) else each["token_id"]
        text = token_name(tokenizer, token)
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        offset += len(text)
        if isinstance(each, int):
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        tops = {token_name(tokenizer, int(i)): max(value, LEAST) for i, value in reversed(each["top"])}
        found["token_logprobs"].append(max(each["logprob"], LEAST))
        found["top_logprobs"].append(dict(reversed(tops.items())))
    return found, offset


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """The `logprobs` of a chat choice, or of a piece of it."""

    def entry(token: int, value: float) -> dict[str, Any]:
        name, raw = token_name(tokenizer, token), tokenizer.token_bytes(token)
        return {"token": name, "logprob": max(value, LEAST), "bytes": list(raw)}

    def with_top(each: TokenLogprob) -> dict[str, Any]:
        top = [entry(int(token), value) for token, value in each["top"]]
        return {**entry(each["token_id"], each["logprob"]), "top_logprobs": top}

    return {"content": [with_top(each) for each in entries]}


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; bytes that are no whole characters as OpenAI writes them, `bytes:\\xe2\\x80`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
