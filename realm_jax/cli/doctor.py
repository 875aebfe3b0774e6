"""`realm doctor`: what this machine gives, and what the engine would do with it."""

import json
import os
import platform
from importlib import metadata
from typing import Annotated, Any

import typer

from realm_jax import __version__
from realm_jax.cli import options
from realm_jax.cli.text import table


def doctor(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    ctx_size: options.CtxSize = None,
    mesh: options.MeshFlag = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    weights: options.Weights = "auto",
    kernels: options.Kernels = "auto",
    kv_dtype: options.KVDType = "auto",
    spec_type: options.SpecType = "auto",
    spec_tokens: options.SpecTokens = 7,
) -> None:
    """Show versions, devices, caches, the default model, and the programs that such a run may compile.

    Example: realm doctor --json
    """
    import jax

    from realm_jax import hub, runtime
    from realm_jax.buckets import Buckets
    from realm_jax.config import EngineConfig
    from realm_jax.kernels.low_rank import LANES

    config = EngineConfig(
        ctx_size=ctx_size,
        mesh=mesh,
        device=device,
        dtype=dtype,
        weights=weights,
        kernels=kernels,
        kv_dtype=kv_dtype,
        spec_type=spec_type,
        spec_tokens=spec_tokens,
    )
    runtime.configure(config)
    numerics = runtime.resolve_numerics(config)
    kernels_used, reason = runtime.choose_kernels(config)
    default = hub.cached_path()
    guesses = spec_tokens if spec_type in ("ngram", "draft") else 0
    buckets = Buckets.plan(ctx_size or 4096, config, numerics.least_rows, numerics.adapter_widths, guesses)
    programs, with_adapters = buckets.programs(), buckets.programs(rank=LANES)
    facts: dict[str, Any] = {
        "realm_jax": __version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "tokenizers")},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": runtime.backend(),
        "devices": [str(each) for each in jax.devices()],
        "mesh": mesh or "none",
        "mesh_devices": [str(each) for each in runtime.mesh_devices(config)],
        "dtype": numerics.dtype,
        "kv_dtype": numerics.kv_dtype,
        "weights": numerics.weights,
        "kernels": kernels_used,
        "kernels_because": reason,
        "cache": str(hub.cache_dir()),
        "compile_cache": str(runtime.program_folder(hub.cache_dir()) or "off"),
        "default_model": str(default) if default else "not downloaded (realm models pull)",
        "programs": programs,
        "adapter_programs": [name for name in with_adapters if name not in programs],
    }
    if as_json:
        print(json.dumps(facts))
        return
    del facts["programs"]
    facts["adapter_programs"] = f"{len(facts['adapter_programs'])} more for each rank of adapters in use"
    print(table((name.replace("_", " "), _text(value)) for name, value in facts.items()))
    print(f"\nprograms that a run may compile: {len(programs)}", *programs, sep="\n  ")


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
