"""The bodies that requests may have: what is checked first, and what /openapi.json says.

Types and names are checked here, ranges by `SamplingParams` and contents by `bodies`. Lists stop at their
first error: a hostile one would have millions.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, WithJsonSchema

from realm_jax.serving.server.errors import ApiError

TOKEN_IDS = {"type": "array", "items": {"type": "integer"}}
TEXTS = {"type": "array", "items": {"type": "string"}}
_OBJECTS = {"type": "array", "items": {"type": "object"}}

Prompts = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, TEXTS, TOKEN_IDS, {"type": "array", "items": TOKEN_IDS}]}),
]
Messages = Annotated[Any, WithJsonSchema(_OBJECTS)]
Strings = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, TEXTS]})]
Biases = Annotated[Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})]
TokenIds = Annotated[list[int], FailFast()]
Adapter = Annotated[
    Any,
    Field(description="Adapters by name: one, or a list of [name, scale]; `model` may name one, too."),
]
Tools = Annotated[Any, WithJsonSchema(_OBJECTS | {"description": "Functions that the model may call."})]
ToolChoice = Annotated[
    Any,
    WithJsonSchema(
        {"anyOf": [{"enum": ["auto", "none", "required"]}, {"type": "object"}], "description": "OpenAI's."}
    ),
]
Refused = Annotated[Any, Field(description="Not served: leave it out.")]


class Body(BaseModel):
    """A JSON object with these fields and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = Field(False, description="A last chunk with the usage, and no choices.")


class GenerationBody(Body):
    """What completions and chats have in common; names are OpenAI's, or vLLM's where OpenAI has none."""

    model: str | None = Field(None, description="A served name, or an adapter's.")
    temperature: float | None = Field(None, description="0 = greedy; 1 if not given.")
    top_p: float | None = None
    top_k: int | None = Field(None, description="0 = off.")
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases = None
    seed: int | None = Field(None, description="The same seed gives the same answer.")
    max_tokens: int | None = Field(None, description="If not given: to an end token or the context's end.")
    min_tokens: int | None = None
    stop: Strings = None
    stop_token_ids: Annotated[Any, WithJsonSchema(TOKEN_IDS)] = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = Field(
        None, description="Control tokens are no text; true if not given."
    )
    n: int | None = None
    prompt_logprobs: int | None = Field(None, description="Best alternatives of each token of the prompt.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(None, description="From 0 on; a larger one waits longer.")
    cache_salt: str | None = Field(
        None, description="Computed prefixes are shared only by requests of one salt."
    )
    lora: Adapter = None
    user: str | None = Field(None, description="Ignored.")
    metadata: Annotated[Any, Field(description="Ignored.")] = None
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    suffix: Refused = None
    best_of: Refused = None
    response_format: Annotated[Any, Field(description="OpenAI's: text, json_object, json_schema.")] = None
    structured_outputs: Annotated[Any, Field(description="vLLM's: json, regex, choice, grammar.")] = None
    service_tier: Annotated[Any, Field(description='Only "auto".')] = None


class CompletionBody(GenerationBody):
    """The body of /v1/completions."""

    prompt: Prompts
    echo: bool | None = Field(None, description="The answer begins with the prompt.")
    logprobs: int | None = Field(None, description="Best alternatives of each token.")


class ChatBody(GenerationBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: Tools = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = Field(
        None, description="Several calls in one answer; true if not given."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="enable_thinking, thinking, reasoning_effort, date_string."
    )


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Refused = None
    cache_salt: Annotated[Any, Field(description="Ignored: nothing is reused.")] = None
    user: str | None = Field(None, description="Ignored.")


class TokenizeBody(Body):
    """The body of /tokenize: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Messages = None
    tools: Tools = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class LoadAdapterBody(Body):
    """An adapter to load: a path within the operator's folder."""

    lora_name: str
    lora_path: str
    model: str | None = Field(None, description="Whose adapter; needed where several models are served.")


class UnloadAdapterBody(Body):
    """An adapter to unload."""

    lora_name: str


class DetokenizeBody(Body):
    """The body of /detokenize."""

    model: str | None = None
    tokens: TokenIds


class TemplateBody(Body):
    """The body of /apply-template."""

    model: str | None = None
    messages: Messages
    tools: Tools = None
    chat_template_kwargs: dict[str, Any] | None = None


FIELDS = {
    "/v1/completions": frozenset(CompletionBody.model_fields),
    "/v1/chat/completions": frozenset(ChatBody.model_fields),
    "/v1/embeddings": frozenset(EmbeddingBody.model_fields),
    "/tokenize": frozenset(TokenizeBody.model_fields),
    "/apply-template": frozenset(TemplateBody.model_fields),
}
B = TypeVar("B", bound=Body)


def checked(kind: type[B], body: object) -> B:
    """The body, if it is one of this kind. Raises ApiError that names the field otherwise."""
    _refuse_unknown(kind, body, "")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    path = ".".join(str(part)[:60] for part in first["loc"])
    match first["type"]:
        case "missing":
            raise ApiError(400, f"{path} is missing", param=path)
        case "model_type":
            raise ApiError(400, f"{path or 'the body'} must be a JSON object", param=path or None)
        case _:
            raise ApiError(400, f"{path}: {first['msg']}", param=path)


def _refuse_unknown(kind: type[Body], body: object, above: str) -> None:
    """Raises ApiError for a field that is not known: pydantic would make an error of each."""
    if not isinstance(body, dict):
        return
    if (unknown := next((name for name in body if name not in kind.model_fields), None)) is not None:
        path, known = above + unknown[:60], ", ".join(sorted(kind.model_fields))
        raise ApiError(400, f"unknown field {path}; known: {known}", param=path, code="unsupported")
    if kind is not StreamOptions:
        _refuse_unknown(StreamOptions, body.get("stream_options"), "stream_options.")
