"""Facts of a run: what the user asks for, and what comes of it."""

import re
from dataclasses import dataclass, fields
from typing import Literal

from realm_jax.config.model import ModelConfig
from realm_jax.errors import RequestError

BLOCK = 64
"""Attention reduces over cache positions in blocks of this size, whatever the capacity: small enough that
what is copied out of the cache stays near the processor."""

TILE = 64
"""Prompts are cut into tiles of so many tokens; a prefill call computes several tiles, of any prompts.
The cuts depend on the prompt alone, as blocks do: so results are independent of batch neighbours, and
two prompts that begin alike can share whole tiles."""

MIN_ROWS = 4
"""No program computes fewer rows: XLA's CPU products are slow, and sum in another order, below this."""

MAX_LORAS_PER_REQUEST = 4
"""So many adapters a request may name: their changes add up."""

MAX_LORA_RANK = 512
"""The largest rank that a bank is made for; adapters of larger ones can be folded."""


Kernels = Literal["reference", "xla", "pallas", "native"]
"""Who multiplies: plain formulas, XLA's compiler alone, kernels for GPU and TPU, or C++ on CPU."""


@dataclass(frozen=True)
class Numerics:
    """The arithmetic of a run: what `EngineConfig` says, every "auto" replaced."""

    dtype: Literal["bfloat16", "float32"]
    kv_dtype: Literal["bfloat16", "float32", "int8"]
    weights: Literal["dense", "quantized", "int8"]
    kernels: Kernels

    @property
    def least_rows(self) -> int:
        """The fewest rows of a decode step."""
        return 1 if self.kernels == "native" else MIN_ROWS

    @property
    def adapter_widths(self) -> tuple[int, ...]:
        """How many adapters a row may have in a call, by program; the C++ kernel skips unused places."""
        return (MAX_LORAS_PER_REQUEST,) if self.kernels == "native" else (1, 2, MAX_LORAS_PER_REQUEST)


@dataclass(frozen=True)
class EngineConfig:
    """Facts of a run, named as the CLI's flags.

    ctx_size: tokens a sequence may hold, prompt included; None = the model's context, at most 4096.
    dtype: arithmetic. "float32" expands weights, and keeps the KV cache and all products in float32.
    weights: storage of projections. "quantized" keeps the file's codes and scales, exactly; "dense" expands;
      "int8" rounds, which "auto" never does: with native kernels what the file has in plain numbers, with
      XLA all but what loses most by it.
    kernels: who multiplies. "native": the C++ kernels, on CPU; "xla": the compiler alone; "pallas": kernels
      for GPU and TPU, interpreted on a CPU, which is for tests; "reference": plain formulas, for comparison.
    kv_dtype: storage of the cache; "auto" follows `dtype`; "int8" has a scale per token and head.
    max_num_seqs: sequences that run at once; further requests wait.
    max_num_batched_tokens: prompt tokens in one prefill call, which is what running sequences wait for.
    max_queue: sequences that may wait for a slot, and of each tenant its share of so many; None = no limit.
    prefix_caching: prompts that begin as an earlier one did reuse what was computed of it.
    deterministic: on every backend the same request gives the same bits whatever runs beside it, by one
      shape for all calls; on CPU that holds without it.
    spec_type: who guesses tokens ahead, which one step then verifies; it changes speed alone. "ngram": what
      followed when the last tokens stood before; "draft": the draft model; "auto": that if there is one.
    spec_tokens: guesses of one sequence that a step verifies at most; fewer where guesses are often wrong or
      the batch is full.
    max_loras: adapters that requests running at once may name; others wait in host memory.
    max_lora_rank: the rank to make room for from the start; None = that of the adapters as they come.
    mesh: "tp=4" divides weights, caches and adapters over four devices, which compute each token together;
      None = one device.
    memory: bytes that weights and caches may take; None = no limit.
    """

    ctx_size: int | None = None
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    weights: Literal["auto", "dense", "quantized", "int8"] = "auto"
    kernels: Literal["auto", "reference", "xla", "pallas", "native"] = "auto"
    kv_dtype: Literal["auto", "bfloat16", "float32", "int8"] = "auto"
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    max_queue: int | None = None
    prefix_caching: bool = True
    deterministic: bool = False
    spec_type: Literal["auto", "none", "ngram", "draft"] = "auto"
    spec_tokens: int = 7
    max_loras: int = 8
    max_lora_rank: int | None = None
    threads: int | None = None
    mesh: str | None = None
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    memory: int | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise RequestError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            is_left_open = value is None and name not in _REQUIRED
            if not is_left_open and (type(value) is not int or not 1 <= value <= limit):
                raise RequestError(f"{name} is {value!r}; it must be a whole number from 1 to {limit:,}")
        if self.mesh is not None and not _MESH.fullmatch(str(self.mesh)):
            raise RequestError(f"mesh is {self.mesh!r}; it must be tp=N, with 1 to 999 devices")
        for name in ("prefix_caching", "deterministic", "offline"):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} is {value!r}; it must be true or false")

    @classmethod
    def from_options(cls, **options: object) -> "EngineConfig":
        """The configuration with these fields set; an unknown name is an error that lists the known ones."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(options) - set(known)):
            raise RequestError(f"unknown option {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**options)  # pyright: ignore[reportArgumentType]: checked in __post_init__

    @property
    def tensor_parallel(self) -> int:
        """The devices that a model is divided over."""
        return 1 if self.mesh is None else int(self.mesh.removeprefix("tp="))

    def context_for(self, model: ModelConfig) -> int:
        """Tokens a sequence may hold with this model."""
        if self.ctx_size is None:
            return min(model.context_length, 4096)
        if self.ctx_size > model.context_length:
            raise RequestError(
                f"context is {self.ctx_size:,} tokens; the model was trained for {model.context_length:,} "
                "(lower --ctx-size)"
            )
        return self.ctx_size


def size_in_bytes(text: str, name: str) -> int:
    """Bytes of a size such as 800M or 2.5G, in powers of ten; a bare number is bytes. name: for the error."""
    units = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    number = text.strip().upper().removesuffix("B")
    unit = units.get(number[-1:], 1)
    try:
        size = float(number[:-1] if unit > 1 else number) * unit
        if 1 <= size < 1e18:
            return int(size)
    except ValueError:
        pass
    raise RequestError(f"{name} is {text[:60]!r}; give a size such as 800M or 2.5G")


_MESH = re.compile("tp=[1-9][0-9]{0,2}")
_LIMITS = {
    "ctx_size": 1 << 24,
    "max_num_seqs": 1 << 24,
    "max_num_batched_tokens": 1 << 20,
    "max_queue": 1 << 24,
    "threads": 1 << 24,
    "max_loras": 1 << 12,
    "spec_tokens": 32,
    "max_lora_rank": MAX_LORA_RANK,
    "memory": 1 << 60,
}
_REQUIRED = ("max_num_seqs", "max_num_batched_tokens", "max_loras", "spec_tokens")
_CHOICES = {
    "dtype": ("auto", "bfloat16", "float32"),
    "weights": ("auto", "dense", "quantized", "int8"),
    "kernels": ("auto", "reference", "xla", "pallas", "native"),
    "kv_dtype": ("auto", "bfloat16", "float32", "int8"),
    "device": ("auto", "cpu", "gpu", "tpu"),
    "spec_type": ("auto", "none", "ngram", "draft"),
}
