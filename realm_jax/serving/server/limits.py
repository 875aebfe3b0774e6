"""What one request may ask for at most. Each limit is a number that an operator can read and change."""

from dataclasses import dataclass

from realm_jax.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Bounds of one HTTP request.

    body_seconds: within which a body must have come. prompts: in one body. sequences: prompts times n.
    logprobs: log-probabilities in one answer, of all tokens and their alternatives.
    ping_seconds: silence in a stream after which a comment is sent. write_seconds: how long a reader may
    take nothing. calls: that run at once on one WebSocket.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 60.0
    depth: int = 32
    prompts: int = 256
    n: int = 32
    sequences: int = 1024
    logprobs: int = 4_000_000
    ping_seconds: float = 15.0
    write_seconds: float = 120.0
    connections: int = 1024
    calls: int = 64
    header_bytes: int = 32 << 10
    idle_seconds: int = 30

    def check_depth(self, value: object) -> None:
        """Raises RequestError if JSON is nested deeper than is allowed."""
        level: list[object] = [value]
        for _ in range(self.depth + 1):
            nested = (each for each in level if isinstance(each, dict | list))
            level = [x for each in nested for x in (each.values() if isinstance(each, dict) else each)]
            if not level:
                return
        raise RequestError(f"the body is nested deeper than {self.depth} levels; give a flatter one")
