"""Strict numerics and runtime shape checks for every test, and the models that tests share."""

import functools
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.monitoring
import pytest
from jaxtyping import install_import_hook

SHAPED = (
    *(
        "banks",
        "cache",
        "delta_rule",
        "decoding",
        "drafters",
        "experts",
        "kernels",
        "layers",
        "lora",
        "model",
        "native_nodes",
        "nodes",
    ),
    *("projections", "quant", "recurrent_cache", "research", "rope", "sampling", "sampling_rows", "scoring"),
    *("sequence_cache", "slot_copies", "speculative", "training", "weights"),
)
"""The modules whose functions take arrays; in the others these checks took most of the time of long tests."""
install_import_hook([f"realm_jax.{name}" for name in SHAPED], "runtime_types.check")
from realm_jax import hub, runtime  # noqa: E402  after the hook, which checks them too

# Programs that change with each edit of the package are compiled anew: JAX's cache knows them by their HLO.
COMPILED = str(hub.cache_dir() / "xla" / runtime.machine())
SETTINGS = {
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_compilation_cache_dir": os.environ.get("JAX_COMPILATION_CACHE_DIR", COMPILED),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(
        value
    )  # of the processes that tests start: they share programs with this one

FIXTURES = Path(os.environ.get("REALM_FIXTURES", Path(__file__).parents[2] / "shared" / "fixtures"))


UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Options of XLA under which a program compiles in a third of the time, and runs slower on a CPU."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tests marked `unoptimized`, with their fixtures, compile engines' programs so."""
    if item.get_closest_marker("unoptimized") is None:
        return (yield)
    with unoptimized():
        return (yield)


@contextmanager
def unoptimized() -> Iterator[None]:
    """Programs of engines are compiled quickly, in this process and in those that it starts.

    This process has read its XLA_FLAGS before: to it they are no more than a part of programs' names.
    """
    compile_as_asked, flags = jax.stages.Lowered.compile, os.environ.get("XLA_FLAGS", "")
    _try_options()

    def compile_quickly(self: jax.stages.Lowered, options: Any = None, **others: Any) -> jax.stages.Compiled:
        return compile_as_asked(self, UNOPTIMIZED | (options or {}), **others)

    named = " ".join(f"--{name}={str(value).lower()}" for name, value in UNOPTIMIZED.items())
    with (
        mock.patch.object(jax.stages.Lowered, "compile", compile_quickly),
        mock.patch.dict(os.environ, XLA_FLAGS=f"{flags} {named}".strip()),
    ):
        yield


@functools.cache
def _try_options() -> None:
    """XLA knows the options; and has read its flags, which change now."""
    jax.jit(lambda: 0).lower().compile(UNOPTIMIZED)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Golden data from llama.cpp; tests that need it say so when they skip."""
    if not FIXTURES.is_dir():
        pytest.skip(f"golden data not found: {FIXTURES} (set REALM_FIXTURES)")
    return FIXTURES


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's file, downloaded if it is not in the cache."""
    from realm_jax import hub

    return hub.resolve(None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def map_counts() -> list[float]:
    """When memory maps were counted."""
    return [time.monotonic()]


@pytest.fixture(autouse=True)
def bounded_programs(map_counts: list[float]) -> Iterator[None]:
    """Compiled programs are dropped before they reach the kernel's limit of memory maps (65,530).

    XLA maps each program in some hundreds of pieces, and aborts the process where it can map no more.
    """
    yield
    if time.monotonic() < map_counts[-1] + 1:  # to count them takes longer than most tests; a second adds few
        return
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()
    map_counts.append(time.monotonic())


@contextmanager
def count_compilations() -> Iterator[list[str]]:
    """The list grows by one entry for each program that XLA compiles inside the block."""
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
