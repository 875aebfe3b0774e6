"""One server from its socket to its last answer: listens, loads, serves, drains."""

import asyncio
import functools
import ipaddress
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import uvicorn

from realm_jax.errors import RequestError
from realm_jax.serving.server.app import build_app
from realm_jax.serving.server.engine_thread import EngineThread
from realm_jax.serving.server.errors import Unavailable
from realm_jax.serving.server.limits import Limits
from realm_jax.serving.server.logs import event
from realm_jax.serving.server.metrics import Metrics
from realm_jax.serving.server.model_pool import ModelPool
from realm_jax.serving.server.pooled_model import PooledModel
from realm_jax.serving.server.protocol import PunctualHTTP
from realm_jax.serving.server.service import Service
from realm_jax.serving.server.tenancy import Tenancy

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
LAST_WORDS = 3.0
"""Seconds in which aborted requests may still be answered."""


@dataclass(frozen=True)
class Settings:
    """What an operator says of a server, the models aside.

    drain_seconds: for what runs when it ends. memory, idle_seconds: as `ModelPool` has them.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    drain_seconds: float = 30.0
    log_prompts: bool = False
    limits: Limits = field(default_factory=Limits)
    tenancy: Tenancy = field(default_factory=Tenancy)
    adapter_folder: Path | None = None
    memory: int | None = None
    idle_seconds: float | None = None


class RealmServer(uvicorn.Server):
    """A server, which listens from the start; `run_to_end` serves until it has drained.

    models: the first is that of requests that name none. on_ready: called with the address when requests are
    served, on the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        models: Sequence[PooledModel],
        on_ready: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings, self._on_ready = settings, on_ready
        is_open = settings.insecure or settings.tenancy.needs_keys
        self.listener = listen(settings.host, settings.port, insecure=is_open)
        metrics = Metrics(model.name for model in models)
        self.engine = EngineThread(metrics)
        self.pool = ModelPool(
            models, self.engine, metrics, memory=settings.memory, idle_seconds=settings.idle_seconds
        )
        self.service = Service(
            self.engine,
            self.pool,
            settings.limits,
            metrics,
            tenancy=settings.tenancy,
            adapter_folder=settings.adapter_folder,
            hosts=None if is_open else LOOPBACK | {settings.host.lower()},
            log_prompts=settings.log_prompts,
        )
        self._draining: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_hurried = False
        limits = settings.limits
        super().__init__(
            uvicorn.Config(
                build_app(self.service),
                http=functools.partial(PunctualHTTP, seconds=limits.idle_seconds),  # pyright: ignore[reportArgumentType]
                ws="websockets-sansio",  # the one that waits for a client that reads slowly
                ws_max_size=limits.body_bytes,
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                limit_concurrency=limits.connections,
                timeout_keep_alive=limits.idle_seconds,
                timeout_graceful_shutdown=int(LAST_WORDS),
                h11_max_incomplete_event_size=limits.header_bytes,
            )
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        host, port = self.listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run_to_end(self) -> bool:
        """The server has drained; whether all its threads have ended. Raises what loading failed with."""
        address = self.address
        event("listening", address=address, status="loading")
        try:
            self.run(sockets=[self.listener])
        finally:
            self.listener.close()
            self.service.close()
            has_ended = self.engine.stop() and self.pool.stop()
        event("stopped", address=address)
        if self._failure is not None:
            raise self._failure
        return has_ended

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; the port listens before any model loads."""
        await super().startup(sockets=sockets)
        self._loop = asyncio.get_running_loop()
        self.engine.start()
        self._starting = asyncio.ensure_future(self._start())

    async def _start(self) -> None:
        """Requests are served, or the server ends and knows why."""
        try:
            await self.pool.start()
        except Unavailable:  # it ends already
            return
        except Exception as error:  # raised again by `run_to_end`
            self._failure, self.service.has_failed, self.should_exit = error, True, True
            return
        self.service.is_ready = True
        event("ready", address=self.address)
        self._on_ready(self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The server drains; a second signal ends what runs at once."""
        del frame
        event("signal", signal=signal.Signals(sig).name)
        self.drain()

    def drain(self) -> None:
        """No new requests are served; the server ends when those that run have, or time is up."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)
        else:
            self.should_exit = True

    def _begin_drain(self) -> None:
        if self._draining is None:
            self._draining = asyncio.ensure_future(self._drain())
        else:
            self._is_hurried = True

    async def _drain(self) -> None:
        service, end = self.service, time.monotonic() + self._settings.drain_seconds
        service.is_draining = True
        event("draining", active=service.active, seconds=self._settings.drain_seconds)
        await _until(lambda: not service.active or self._is_hurried, end)
        if service.active:
            event("aborting", active=service.active)
            self.engine.abort_all()
            self.pool.close()
            await _until(lambda: not service.active, time.monotonic() + LAST_WORDS)
        self.pool.close()
        self.should_exit = True


async def _until(condition: Callable[[], bool], end: float) -> None:
    while not condition() and time.monotonic() < end:
        await asyncio.sleep(0.02)


def listen(host: str, port: int, *, insecure: bool) -> socket.socket:
    """A socket that listens there. Raises RequestError for a place that cannot or may not be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"--host is {host!r}: {error}") from error
    family, kind, protocol, _, place = min(found, key=lambda each: each[0] != socket.AF_INET)
    if not insecure and not ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback:
        raise RequestError(
            f"--host is {host!r}, which others can reach, and there are no keys: anyone could use this "
            "server (make one: realm serve keys create; or listen on 127.0.0.1, or allow it with --insecure)"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise RequestError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
    return listener
