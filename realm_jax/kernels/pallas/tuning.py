"""Where a kernel runs, and the block sizes that suit it there: one table, `tuning.json`, for all kernels.

The table is device kind -> kernel -> bucket of shapes -> {name: size}. A device kind is a prefix of what JAX
calls the device, "" fits any; of several that fit, the longest wins. Buckets are paths, the most special
part last: what is not found under "prefill/bfloat16/64" is looked up under "prefill/bfloat16", and so on.
`scripts/bench_kernels --write` measures the entries of a device.
"""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from realm_jax.errors import RequestError

TABLE = Path(__file__).with_name("tuning.json")
VARIABLE = "REALM_TUNING"
"""The environment variable that names another table; what that lacks is taken from `TABLE`."""

LARGEST = 1 << 16
Sizes = Mapping[str, int]
Table = Mapping[str, Mapping[str, Mapping[str, Sizes]]]


@dataclass(frozen=True)
class Target:
    """Where a kernel runs."""

    platform: Literal["gpu", "tpu"]  # whose form of kernel
    kind: str  # what JAX calls the device; "cpu" where it is interpreted
    interpret: bool


def target() -> Target:
    """Of this process. On a CPU the kernels for GPUs run, interpreted."""
    backend = jax.default_backend()
    if backend == "cpu":
        return Target("gpu", "cpu", interpret=True)
    return Target("tpu" if backend == "tpu" else "gpu", jax.devices()[0].device_kind, interpret=False)


def sizes(kernel: str, kind: str, bucket: str) -> Sizes:
    """The block sizes of a kernel for such shapes on a device of this kind."""
    tables = [table for table in (override(), read(TABLE)) if table is not None]
    parts = bucket.split("/")
    names = ["/".join(parts[:n]) for n in range(len(parts), 0, -1)]
    for table in tables:
        for prefix in sorted((p for p in table if kind.startswith(p)), key=len, reverse=True):
            buckets = table[prefix].get(kernel, {})
            for name in names:
                if name in buckets:
                    return buckets[name]
    raise RequestError(f"no block sizes for {kernel} {bucket!r} on {kind!r}; add them to {TABLE.name}")


def override() -> Table | None:
    """The table that `VARIABLE` names, which decides with `TABLE` what is compiled."""
    path = os.environ.get(VARIABLE)
    return read(Path(path)) if path else None


@functools.cache
def read(path: Path) -> Table:
    """The table in a file.

    Raises RequestError where it is none, naming the entry.
    """
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as problem:
        raise RequestError(f"tuning table {path} cannot be read: {problem}") from None
    for kind, kernels in _entries(table, str(path)):
        for kernel, buckets in _entries(kernels, kind):
            for bucket, found in _entries(buckets, f"{kind} {kernel}"):
                for name, size in _entries(found, f"{kind} {kernel} {bucket}"):
                    if type(size) is not int or not 0 <= size <= LARGEST:
                        raise RequestError(
                            f"tuning table {path}: {kind!r} {kernel} {bucket}: {name} is {size!r}; "
                            f"it must be a whole number from 0 to {LARGEST:,}"
                        )
    return table


def _entries(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise RequestError(f"tuning table: {where!r} is {value!r}; it must be an object")
    return list(value.items())


def write(path: Path, kind: str, kernel: str, measured: Mapping[str, Sizes]) -> None:
    """The table in the file has these buckets of a kernel; its others stay."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(kind, {}).setdefault(kernel, {}).update({k: dict(v) for k, v in measured.items()})
    path.write_text(_text(table))
    read.cache_clear()


def _text(table: Table) -> str:
    """JSON with a line for each bucket."""
    kinds = []
    for kind, kernels in table.items():
        found = []
        for kernel, buckets in kernels.items():
            lines = [
                f"      {json.dumps(name)}: {json.dumps(dict(entry))}" for name, entry in buckets.items()
            ]
            found.append(f"    {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n    }")
        kinds.append(f"  {json.dumps(kind)}: {{\n" + ",\n".join(found) + "\n  }")
    return "{\n" + ",\n".join(kinds) + "\n}\n"
