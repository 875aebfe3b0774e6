"""Work over many blocks, spread over the cores in chunks that bound the memory in use."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

# Values a thread takes at a time: few enough that its temporaries stay in the cache.
CHUNK = 2**18


def for_each_chunk(task: Callable[[slice], None], blocks: int, elements: int, values: int = CHUNK) -> None:
    """`task` has run for every chunk of `blocks` blocks of `elements` values; NumPy's loops leave the GIL.

    values: those of a chunk, more than a block has.
    """
    size = values // elements
    chunks = [slice(start, start + size) for start in range(0, blocks, size)]

    def run(chunk: slice) -> None:
        # Infinite and NaN scales are values like others; to look for them is not this function's task.
        with np.errstate(all="ignore"):
            task(chunk)

    over = map if len(chunks) == 1 else _threads().map  # a hand-over to a thread costs more than one chunk
    for _ in over(run, chunks):
        pass


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "dequantize")


# Threads do not survive a fork; a child makes its own.
os.register_at_fork(after_in_child=_threads.cache_clear)
