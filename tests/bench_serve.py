"""Throughput of the server beside the same requests in process: many streams, by turns, medians, in JSON.

--peer PYTHON: also beside `llama_cpp.server` of that Python's packages, with the same file, texts and limits,
greedy and whole answers of both. It answers one request after another: the ratio is what batching brings.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

import httpx
from peer_server import PeerServer
from served_process import Served

from realm_jax import LLM, SamplingParams, hub

CONTEXT = 1024
WORDS = "river stone lamp winter bread music letter garden engine cloud silver".split()  # noqa: SIM905


def prompts(streams: int, words: int, seed: int) -> list[str]:
    """Different ones each time: no prefix is there already."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=words)) for _ in range(streams)]


async def served(address: str, texts: list[str], tokens: int) -> float:
    """Tokens a second of all streams together, from the first request to the last end."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:

        async def stream(text: str) -> int:
            body = {
                "prompt": text,
                "max_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "stream": True,
            }
            body["stream_options"] = {"include_usage": True}
            usage: dict[str, Any] = {}
            async with http.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        usage = json.loads(line[6:]).get("usage") or usage
            return usage["completion_tokens"]

        start = time.perf_counter()
        counts = await asyncio.gather(*map(stream, texts))
        return sum(counts) / (time.perf_counter() - start)


async def answered(address: str, texts: list[str], tokens: int) -> float:
    """Tokens a second of whole answers, asked for together; one may end before the limit."""
    async with httpx.AsyncClient(base_url=address, timeout=3600) as http:

        async def ask(text: str) -> int:
            body = {"prompt": text, "max_tokens": tokens, "temperature": 0}
            answer = await http.post("/v1/completions", json=body)
            return answer.raise_for_status().json()["usage"]["completion_tokens"]

        start = time.perf_counter()
        counts = await asyncio.gather(*map(ask, texts))
        return sum(counts) / (time.perf_counter() - start)


def in_process(llm: LLM, texts: list[str], tokens: int) -> float:
    """The same of `LLM.generate`."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
    start = time.perf_counter()
    outputs = llm.generate(texts, params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start)


def beside_peer(asked: argparse.Namespace, address: str, peer: PeerServer) -> dict[str, object]:
    """Medians of both servers, and of the ratios pair by pair, after a first round that compiles."""
    pairs = []
    for round_ in range(asked.rounds + 1):
        texts = prompts(asked.streams, asked.words, 1000 + round_)
        ours, theirs = (asyncio.run(answered(each, texts, asked.tokens)) for each in (address, peer.address))
        pairs.append((ours, theirs))
    pairs = pairs[1:]
    ratios = [ours / theirs for ours, theirs in pairs]
    return {
        "whole_answers": round(statistics.median(ours for ours, _ in pairs), 1),
        "llama_cpp_server": round(statistics.median(theirs for _, theirs in pairs), 1),
        "ratio_to_llama_cpp_server": round(statistics.median(ratios), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--words", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", help="a Python that has llama-cpp-python[server]", metavar="PYTHON")
    asked = parser.parse_args()
    llm = LLM(asked.model, ctx_size=CONTEXT, max_num_seqs=asked.streams)
    model = [] if asked.model is None else ["-m", asked.model]
    peer = None if asked.peer is None else PeerServer(asked.peer, hub.resolve(asked.model), CONTEXT)
    server = Served("--ctx-size", CONTEXT, "--max-num-seqs", asked.streams, *model)
    try:
        address = server.address()
        rows = []
        for round_ in range(asked.rounds + 1):
            texts = [prompts(asked.streams, asked.words, 2 * round_ + i) for i in range(2)]
            ours = asyncio.run(served(address, texts[0], asked.tokens))
            rows.append((ours, in_process(llm, texts[1], asked.tokens)))
        beside = {} if peer is None else beside_peer(asked, address, peer)
    finally:
        server.close()
        if peer is not None:
            peer.close()
    rows = rows[1:]  # the first compiles
    report = {
        "streams": asked.streams,
        "served": round(statistics.median(row[0] for row in rows), 1),
        "in_process": round(statistics.median(row[1] for row in rows), 1),
        "ratio": round(statistics.median(a / b for a, b in rows), 3),
        "ratios": [round(a / b, 3) for a, b in rows],
    }
    print(json.dumps(report | beside))


if __name__ == "__main__":
    main()
