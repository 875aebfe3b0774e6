"""JAX as a run needs it: device, threads and compilation cache."""

import contextlib
import ctypes
import functools
import gc
import hashlib
import logging
import os
import platform
import random
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from realm_jax.config import EngineConfig, Kernels, Numerics
from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.kernels import native

_log = logging.getLogger(__name__)

DTYPES: dict[str, Literal["bfloat16", "float32"]] = dict.fromkeys(("cpu", "gpu", "tpu"), "bfloat16")
"""What `dtype=auto` means on each backend. bf16 weights give float32's perplexity to 0.1 %."""


def configure(config: EngineConfig) -> None:
    """JAX runs on the asked device and threads.

    Threads and device count only until JAX has first been used in this process.
    Raises RequestError if the device is not there.
    """
    if config.threads is not None:
        os.environ["NPROC"] = str(config.threads)  # the size of XLA's CPU thread pool
    if config.device != "auto":
        name = "cuda" if config.device == "gpu" else config.device
        jax.config.update("jax_platforms", name)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # asserted where only CUDA may be used and there is none
        reason = next(iter(str(error).splitlines()), "JAX sees no such device")
        raise RequestError(f"device {config.device!r} is not available: {reason}") from error
    if jax.default_backend() == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Memory that a step gives back stays with the process, on glibc.

    XLA allocates what a step works in anew each time; new pages cost a tenth of a short step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that it allows
    _keep_up_to(1 << 30)


@contextlib.contextmanager
def giving_memory_back() -> Iterator[None]:
    """What is freed while the context is open is the system's again, on glibc.

    Threads have memory of their own there, of which a later trim would give back the smaller part.
    """
    keeps = jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc"
    if keeps:
        _keep_up_to(0)
    try:
        yield
    finally:
        if keeps:
            _keep_up_to(1 << 30)


def collect_garbage() -> None:
    """What nothing refers to any more is freed."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


def _keep_up_to(free: int) -> None:
    """So many free bytes stay with each part of the process's memory."""
    ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, free)


def program_folder(cache: Path) -> Path | None:
    """Where compiled programs are kept; None where JAX's compilation cache is turned off."""
    is_on = jax.config.values["jax_enable_compilation_cache"]
    return cache / "xla" / machine() / "programs" if is_on else None


def backend() -> str:
    """cpu, gpu or tpu."""
    name = jax.default_backend()
    if name not in DTYPES:
        raise UnsupportedError(f"JAX backend {name!r} is not supported; choose --device cpu, gpu or tpu")
    return name


def resolve_numerics(config: EngineConfig) -> Numerics:
    """The arithmetic of a run. "auto" keeps quantized weights where kernels multiply them.

    Raises UnsupportedError or RequestError for kernels that this machine or `dtype` does not allow,
    RequestError for int8 weights in float32.
    """
    dtype = _dtype(config)
    if config.weights == "int8" and dtype == "float32":
        raise RequestError("weights='int8' are multiplied in int8; use dtype='bfloat16' or weights='dense'")
    kernels, reason = choose_kernels(config)
    _log.info("kernels: %s, because %s", kernels, reason)
    weights = config.weights
    if weights == "auto":
        weights = "quantized" if kernels in ("native", "pallas") else "dense"
    return Numerics(dtype, dtype if config.kv_dtype == "auto" else config.kv_dtype, weights, kernels)


def join_processes(coordinator: str | None, count: int | None, index: int | None) -> None:
    """This process computes with the others of its run; None: as SLURM or the TPU pod says.

    Before JAX is first used in this process. Raises RequestError where they are not found.
    """
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "no reason was given")
        raise RequestError(f"the processes of this run do not find each other: {reason}") from error


def process_index() -> int:
    """Which of the run's processes this is."""
    return jax.process_index()


def seeds(is_shared: bool) -> Callable[[], int]:
    """Gives another seed at each call.

    is_shared: of processes that compute together, the same to each.
    """
    if not is_shared:
        return functools.partial(secrets.randbits, 32)
    from jax.experimental import multihost_utils

    first = multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32)))
    return functools.partial(random.Random(int(first)).getrandbits, 32)


def mesh_devices(config: EngineConfig) -> list[Any]:
    """The devices that the model is divided over, of all processes; one where there is no mesh.

    Raises RequestError where there are too few, or where a process would have none.
    """
    wanted = config.tensor_parallel
    if wanted == 1:
        return jax.local_devices()[:1]
    found = jax.devices()
    if wanted > len(found):
        virtual = f"; to try it on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        raise RequestError(
            f"mesh is {config.mesh!r}; JAX sees {len(found)} {backend()} device{'s' * (len(found) > 1)} "
            f"(lower it, or start a process on each host{virtual if backend() == 'cpu' else ''})"
        )
    if jax.process_count() > 1 and wanted != len(found):
        raise RequestError(
            f"mesh is {config.mesh!r}; {jax.process_count()} processes have {len(found)} devices, and all of "
            f"them take part (--mesh tp={len(found)}, or fewer processes)"
        )
    return found[:wanted]


def missing_kernels(config: EngineConfig) -> str | None:
    """Why a run that would use the C++ kernels goes without them; None where nothing is missing."""
    is_default = config.kernels == "auto" and config.dtype != "float32" and config.tensor_parallel == 1
    wants = is_default and backend() == "cpu"
    return native.problem() if wants else None


def choose_kernels(config: EngineConfig) -> tuple[Kernels, str]:
    """Who multiplies in such a run, and why.

    Raises UnsupportedError or RequestError for kernels that are asked for and cannot be.
    """
    if config.kernels == "native":
        _require_native(config)
    if config.kernels == "auto" and backend() == "cpu" and config.tensor_parallel > 1:
        return "xla", "the C++ kernels run on one device, and the mesh has several"
    if config.kernels != "auto":
        is_interpreted = config.kernels == "pallas" and backend() == "cpu"
        return config.kernels, "they were asked for" + ("; on a CPU they are interpreted" * is_interpreted)
    if backend() != "cpu":
        return "xla", f"no others have been measured on {backend()} (kernels='pallas' tries ours)"
    if _dtype(config) == "float32":
        return "xla", "the C++ kernels do not multiply in float32"
    if problem := native.problem():
        return "xla", f"the C++ kernels cannot be used: {problem}"
    return "native", f"this processor has {native.select()}"


def _require_native(config: EngineConfig) -> None:
    if config.tensor_parallel > 1:
        raise UnsupportedError(
            f"kernels='native' run on one device; mesh is {config.mesh!r} (kernels='xla', or no mesh)"
        )
    if _dtype(config) == "float32":
        raise RequestError(
            "kernels='native' multiply in int8 and bf16; use dtype='bfloat16' or kernels='xla'"
        )
    if backend() != "cpu":
        raise UnsupportedError(f"kernels='native' are for CPUs; the device is {backend()} (kernels='xla')")
    if problem := native.problem():
        raise UnsupportedError(f"kernels='native' cannot be used: {problem} (kernels='xla')")


def _dtype(config: EngineConfig) -> Literal["bfloat16", "float32"]:
    return DTYPES[backend()] if config.dtype == "auto" else config.dtype


def machine() -> str:
    """A name for this kind of processor: compiled programs fit no other."""
    try:
        cpu = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
        features = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]
