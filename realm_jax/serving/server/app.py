"""The application: which path is answered by what."""

from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import ASGIApp

from realm_jax.serving.bodies import CHAT, COMPLETIONS
from realm_jax.serving.server import embeddings, generation, pages
from realm_jax.serving.server.adapters import load_adapter, unload_adapter
from realm_jax.serving.server.gate import Gate
from realm_jax.serving.server.page import page
from realm_jax.serving.server.service import Service
from realm_jax.serving.server.websocket import websocket

ROUTES = (
    Route(COMPLETIONS, generation.completions, methods=["POST"]),
    Route(CHAT, generation.chat_completions, methods=["POST"]),
    Route("/v1/embeddings", embeddings.embeddings, methods=["POST"]),
    Route("/tokenize", pages.tokenize, methods=["POST"]),
    Route("/detokenize", pages.detokenize, methods=["POST"]),
    Route("/tokenizer_info", pages.tokenizer_info),
    Route("/apply-template", pages.apply_template, methods=["POST"]),
    Route("/v1/load_lora_adapter", load_adapter, methods=["POST"]),
    Route("/v1/unload_lora_adapter", unload_adapter, methods=["POST"]),
    Route("/v1/models", pages.models),
    Route("/v1/models/{name:path}", pages.model),
    Route("/props", pages.props),
    Route("/health", pages.health),
    Route("/metrics", pages.prometheus),
    Route("/version", pages.version),
    Route("/openapi.json", pages.openapi),
    WebSocketRoute("/ws", websocket),
    Route("/", page),
    Route("/page.css", page),
    Route("/page.js", page),
)


def build_app(service: Service) -> ASGIApp:
    """The application over a service."""
    return Gate(Router(ROUTES, redirect_slashes=False), service)
