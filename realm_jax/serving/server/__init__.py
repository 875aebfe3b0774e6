"""The HTTP server: OpenAI's API over the one engine.

The route of a request: `app` (routes), `reading` (bytes to a checked body), `jobs` (a body to the engine's
requests), `engine_thread` (the engine's loop on a thread of its own), `generation` (outputs to an answer,
whole or as a stream of `sse`).
"""
