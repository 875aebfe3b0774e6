"""Time of each Pallas kernel beside plain formulas, XLA, cuDNN and what the device allows, as JSON.

On a CPU tiny shapes run, interpreted: that shows that all is callable, and says nothing of speed.
Example: scripts/bench_kernels --only attention --write
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import bench_attention
import bench_matmul
from bench_device import Device, device

from realm_jax.kernels.pallas import tuning

PARTS: dict[str, Any] = {"attention": bench_attention, "matmul": bench_matmul}
"""Each has `measure(device, rounds)`, rows of JSON, and `tune(device, rounds)`, the fastest block sizes:
kernel of the tuning table -> bucket -> sizes."""


def report(where: Device, parts: list[str], rounds: int) -> dict[str, Any]:
    """What the parts measured on a device."""
    rows = [row for part in parts for row in PARTS[part].measure(where, rounds)]
    return {
        "device": where.kind,
        "interpreted": where.target.interpret,
        "bytes_per_second": where.bandwidth,
        "flops_per_second": where.flops,
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", choices=PARTS, action="append", help="measure this alone (repeatable)")
    words.add_argument("--rounds", type=int, default=5, help="timings of each, of which the best counts")
    words.add_argument("--write", action="store_true", help="try block sizes and keep the fastest")
    words.add_argument("--table", type=Path, default=tuning.TABLE, help="the tuning table to write")
    given = words.parse_args(arguments)
    where, parts = device(), given.only or list(PARTS)
    if given.write:
        for part in parts:
            for kernel, measured in PARTS[part].tune(where, given.rounds).items():
                tuning.write(given.table, where.kind, kernel, measured)
                print(f"{given.table}: {where.kind!r} {kernel}: {', '.join(measured)}", file=sys.stderr)
    print(json.dumps(report(where, parts, given.rounds), indent=1))


if __name__ == "__main__":
    main()
