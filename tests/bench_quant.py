"""Million values a second that `quant` expands, best of several runs, as JSON."""

import json
import os
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np

from realm_jax import quant
from realm_jax.ggml import BLOCK_SIZES, GGMLType

USUAL = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16")
SHAPE = (4096, 8192)


def best_seconds(task: Callable[[], object], repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def rate(kind: GGMLType, dtype: np.dtype) -> int:
    block = BLOCK_SIZES[kind]
    nbytes = SHAPE[0] * SHAPE[1] // block.elements * block.nbytes
    data = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    out = np.zeros(SHAPE, dtype)
    return round(out.size / best_seconds(lambda: quant.dequantize_into(data, kind, out)) / 1e6)


if __name__ == "__main__":
    names = [name.upper() for name in sys.argv[1:]] or USUAL
    dtypes = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
    rates = {name: {key: rate(GGMLType[name], dtype) for key, dtype in dtypes.items()} for name in names}
    print(json.dumps({"unit": "million values/s", "cores": os.cpu_count(), "types": rates}, indent=2))
