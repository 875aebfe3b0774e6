"""Load on a running server from clients that behave and clients that do not; prints JSON.

Streams come and go for a while: most read to the end, some disconnect, read slowly, send bad JSON, bodies
that are too large, or wrong, revoked or no keys. Beside them /health is asked twenty times a second. At the
end nothing may run or wait, and every stream that was accepted must have ended exactly once. Without --url a
server of the default model is started, with tenants and keys; its memory is watched, and that no key can be
read in its log or in the list of processes.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from served_process import Served
from soak_keys import KeyFolder, Keys

WORDS = "river stone lamp winter bread music letter garden engine cloud silver".split()  # noqa: SIM905
HEALTH_EVERY_S = 0.05
IDLE_WITHIN_S = 60.0


@dataclass
class Report:
    """What happened, so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)
    first_token_ms: list[float] = field(default_factory=list)
    tokens: int = 0

    def expect(self, is_right: bool, what: str) -> None:
        """Something that must be so was looked at."""
        if not is_right and len(self.wrong) < 20:
            self.wrong.append(what)


class Client:
    """One of many that ask at once."""

    def __init__(self, http: httpx.AsyncClient, report: Report, seed: int, keys: Keys) -> None:
        self._http, self._report, self._random = http, report, random.Random(seed)
        self._headers, self._bad_keys = bearer(keys.good[seed % len(keys.good)]), list(keys.bad.items())
        self._first_bad = self._bad_keys[seed : seed + 1]  # so that each is sent at least once

    async def run(self, until: float) -> None:
        """Requests one after another."""
        kinds: dict[Callable[[], Awaitable[None]], int] = {
            self._read_all: 60,
            self._disconnect: 12,
            self._read_slowly: 8,
            self._bad_json: 8,
            self._too_large: 6,
            self._bad_value: 6,
            self._wrong_key: 6 * bool(self._bad_keys),
        }
        for why, key in self._first_bad:
            await self._unauthorized(why, key)
        while time.monotonic() < until:
            (kind,) = self._random.choices(list(kinds), list(kinds.values()))
            await kind()

    def _body(self, **more: Any) -> dict[str, Any]:
        words = self._random.choices(WORDS, k=self._random.randint(3, 60))
        return {
            "messages": [{"role": "user", "content": "Tell me about " + " and ".join(words)}],
            "max_completion_tokens": self._random.randint(1, 64),
            "temperature": self._random.choice([0, 0.8]),
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }

    async def _stream(self, name: str, pause: float = 0.0, leave_after: int | None = None) -> None:
        body, start, chunks, done, usage = self._body(), time.perf_counter(), 0, 0, None
        reasons: Counter[int] = Counter()
        async with self._http.stream(
            "POST", "/v1/chat/completions", json=body, headers=self._headers
        ) as response:
            if response.status_code in (429, 503):
                self._report.outcomes["refused"] += 1
                self._report.expect("retry-after" in response.headers, "a refusal says when to come again")
                await response.aread()
                await asyncio.sleep(0.2)
                return
            self._report.expect(response.status_code == 200, f"{name}: status {response.status_code}")
            async for line in response.aiter_lines():
                if not line.startswith("data: "):
                    continue
                if line == "data: [DONE]":
                    done += 1
                    continue
                chunk = json.loads(line[6:])
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    reasons[choice["index"]] += choice.get("finish_reason") is not None
                    if not chunks:
                        self._report.first_token_ms.append(1000 * (time.perf_counter() - start))
                    chunks += 1
                if leave_after is not None and chunks >= leave_after:
                    self._report.outcomes["left"] += 1
                    return
                if pause:
                    await asyncio.sleep(pause)
        self._report.outcomes[name] += 1
        self._report.expect(done == 1, f"{name}: [DONE] came {done} times")
        self._report.expect(dict(reasons) == {0: 1}, f"{name}: ends {dict(reasons)}")
        self._report.expect(usage is not None, f"{name}: no usage")
        if usage is not None:
            self._report.tokens += usage["completion_tokens"]
            limit = body["max_completion_tokens"]
            self._report.expect(0 < usage["completion_tokens"] <= limit, f"{name}: {usage} of {limit}")

    async def _read_all(self) -> None:
        await self._stream("read to the end")

    async def _disconnect(self) -> None:
        await self._stream("read to the end", leave_after=self._random.randint(1, 20))

    async def _read_slowly(self) -> None:
        await self._stream("read slowly", pause=0.1)

    async def _refused(
        self, name: str, status: int, content: bytes, key: dict[str, str] | None = None
    ) -> None:
        headers = {"Content-Type": "application/json"} | (self._headers if key is None else key)
        response = await self._http.post("/v1/chat/completions", content=content, headers=headers)
        self._report.outcomes[name] += 1
        self._report.expect(response.status_code == status, f"{name}: status {response.status_code}")
        self._report.expect("message" in response.json().get("error", {}), f"{name}: {response.text[:200]}")

    async def _bad_json(self) -> None:
        content = json.dumps(self._body()).encode()
        await self._refused("bad JSON", 400, content[: -self._random.randint(1, 40)])

    async def _too_large(self) -> None:
        try:
            await self._refused("too large", 413, b'{"messages": "' + b"x" * (32 << 20) + b'"}')
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            self._report.outcomes["too large, cut off"] += 1

    async def _bad_value(self) -> None:
        await self._refused("bad value", 400, json.dumps(self._body(temperature="hot")).encode())

    async def _wrong_key(self) -> None:
        await self._unauthorized(*self._random.choice(self._bad_keys))

    async def _unauthorized(self, why: str, key: str | None) -> None:
        body = json.dumps(self._body()).encode()
        await self._refused(f"401, {why}", 401, body, bearer(key))


def bearer(key: str | None) -> dict[str, str]:
    """The header that has the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


async def ask_health(http: httpx.AsyncClient, report: Report, until: float) -> None:
    """How long /health takes, twenty times a second."""
    while time.monotonic() < until:
        start = time.perf_counter()
        response = await http.get("/health")
        report.health_ms.append(1000 * (time.perf_counter() - start))
        report.expect(response.status_code == 200, f"/health: status {response.status_code}")
        await asyncio.sleep(HEALTH_EVERY_S)


async def figures(http: httpx.AsyncClient, headers: dict[str, str]) -> dict[str, float]:
    """Sums of the engine's figures, by name."""
    text = (await http.get("/metrics", headers=headers)).text
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^(realm:\w+)(?:{[^}]*})? (\S+)$", text, re.MULTILINE):
        found[name] += float(value)  # pyright: ignore[reportArgumentType]: sums of floats count, too
    return dict(found)


async def drive(url: str, streams: int, seconds: float, keys: Keys) -> dict[str, Any]:
    """The report of a load."""
    report = Report()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=streams)
    async with (
        httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http,
        httpx.AsyncClient(base_url=url, timeout=60) as apart,
    ):
        until = time.monotonic() + seconds
        clients = [Client(http, report, seed, keys).run(until) for seed in range(streams)]
        start = time.perf_counter()
        await asyncio.gather(ask_health(apart, report, until), *clients)
        took = time.perf_counter() - start
        left = await wait_for_idle(apart, bearer(keys.admin))
    return {
        "streams": streams,
        "seconds": round(took, 1),
        "outcomes": dict(report.outcomes),
        "tokens_per_second_of_those_read": round(report.tokens / took, 1),
        "health_ms": percentiles(report.health_ms),
        "first_token_ms": percentiles(report.first_token_ms),
        "left_running": left,
        "wrong": report.wrong,
    }


async def wait_for_idle(http: httpx.AsyncClient, headers: dict[str, str]) -> float:
    """How many requests still run or wait, some time after the last client has gone."""
    end = time.monotonic() + IDLE_WITHIN_S
    while True:
        now = await figures(http, headers)
        left = now["realm:num_requests_running"] + now["realm:num_requests_waiting"]
        if not left or time.monotonic() > end:
            return left
        await asyncio.sleep(0.2)


def soak(streams: int, seconds: float, *arguments: object) -> dict[str, Any]:
    """The report of a load on a server of its own, which must end well; memory in MB, after a first load."""
    with tempfile.TemporaryDirectory(prefix="realm-soak-") as folder:
        keys = KeyFolder(Path(folder))
        served = Served("--max-queue", 4 * streams, "--ctx-size", 1024, *keys.flags, *arguments)
        try:
            address = served.address()
            process = psutil.Process(served.process.pid)
            asyncio.run(drive(address, streams, min(seconds, 5.0), keys.before()))
            before = process.memory_info().rss
            report = asyncio.run(drive(address, streams, seconds, keys.after()))
            after = process.memory_info().rss
            seen = keys.seen(served.events)
            served.process.terminate()
            code = served.end()
            seen += [place for place in keys.seen(served.events) if place not in seen]
        finally:
            served.close()
            keys.close()
    memory = [round(each / 1e6) for each in (before, after)]
    return report | {"memory_mb": memory, "exit_code": code, "keys_seen_in": seen}


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    return {f"p{p}": round(float(np.percentile(values, p)), 1) for p in (50, 90, 99)} if values else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", help="a running server")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--key", help="an API key; without one, none is sent")
    asked = parser.parse_args()
    if asked.url is None:
        report = soak(asked.streams, asked.seconds)
    else:
        bad = {} if asked.key is None else {"no key's form": "realm-nobody-nothing", "no key": None}
        keys = Keys((asked.key,), bad, asked.key)
        report = asyncio.run(drive(asked.url, asked.streams, asked.seconds, keys))
    print(json.dumps(report, indent=1))
    return 1 if report["wrong"] or report["left_running"] or report.get("keys_seen_in") else 0


if __name__ == "__main__":
    sys.exit(main())
