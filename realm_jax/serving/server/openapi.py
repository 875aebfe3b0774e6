"""The description of the API, made of the models that check it."""

from typing import Any

from pydantic.json_schema import models_json_schema

from realm_jax import __version__
from realm_jax.serving.bodies import CHAT, COMPLETIONS
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    LoadAdapterBody,
    TemplateBody,
    TokenizeBody,
    UnloadAdapterBody,
)

POSTS: dict[str, tuple[type[Body], str]] = {
    COMPLETIONS: (CompletionBody, "Texts that continue prompts."),
    CHAT: (ChatBody, "Answers to a conversation."),
    "/v1/embeddings": (EmbeddingBody, "Means of the hidden states of texts, of length 1."),
    "/tokenize": (TokenizeBody, "The tokens of a text or a conversation."),
    "/detokenize": (DetokenizeBody, "The text of tokens."),
    "/v1/load_lora_adapter": (LoadAdapterBody, "An adapter becomes a model; for admins."),
    "/v1/unload_lora_adapter": (UnloadAdapterBody, "An adapter is one no more; for admins."),
    "/apply-template": (TemplateBody, "The text that the chat template makes of a conversation."),
}
GETS = {
    "/v1/models": "The models and their adapters, and which are loaded.",
    "/v1/models/{name}": "One of them.",
    "/tokenizer_info": "The special tokens and the chat template, under Transformers' names.",
    "/props": "Facts of a model and its run: ?model=NAME, or the first.",
    "/health": "200 while requests are served, 503 otherwise.",
    "/metrics": "Prometheus metrics.",
    "/version": "This program's version.",
    "/openapi.json": "This description.",
}
ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(limits: Limits) -> dict[str, Any]:
    """The OpenAPI document of this server."""
    kinds = [(kind, "validation") for kind, _ in POSTS.values()]
    _, made = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # pyright: ignore[reportArgumentType]
    paths: dict[str, Any] = {
        path: {"post": _post(kind, text, path in (COMPLETIONS, CHAT))} for path, (kind, text) in POSTS.items()
    }
    for path, text in GETS.items():
        paths[path] = {"get": {"summary": text, "responses": {"200": {"description": "OK"}, **_errors()}}}
        if "{name}" in path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            paths[path]["get"]["parameters"] = [name]
    about = f"Bodies have up to {limits.body_bytes:,} bytes, {limits.prompts:,} prompts and n {limits.n:,}."
    return {
        "openapi": "3.1.0",
        "info": {"title": "realm", "version": __version__, "description": about},
        "paths": paths,
        "components": {"schemas": {**made["$defs"], "Error": ERROR}},
    }


def _post(kind: type[Body], text: str, streams: bool) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    answers: dict[str, Any] = {"application/json": {}} | ({"text/event-stream": {}} if streams else {})
    return {
        "summary": text,
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {"200": {"description": "OK", "content": answers}, **_errors()},
    }


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"default": {"description": "An error.", "content": content}}
