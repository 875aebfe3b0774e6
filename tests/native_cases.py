"""What the tests of the C++ kernels share: random weights of every type, and whether there are kernels."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from realm_jax import quant
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.kernels import native

BLOCKS = [kind for kind, form in quant.FORMATS.items() if isinstance(form, quant.BlockFormat)]
PROCESSORS = ("x86_64", "amd64", "aarch64", "arm64")
SMALLEST = float(np.finfo(np.float32).tiny)


def require_native() -> None:
    """The calling module is skipped without the kernels; in CI it fails, if they could have been built."""
    problem = native.problem()
    if problem is None:
        return
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if "CI" in os.environ and compiler and platform.machine().lower() in PROCESSORS:
        raise RuntimeError(f"there are no C++ kernels, though {compiler} could build them: {problem}")
    pytest.skip(f"no C++ kernels: {problem}", allow_module_level=True)


def instruction_sets() -> list[str]:
    """Those of this machine, the best first."""
    names = [name for name in native.INSTRUCTION_SETS if native.select(name) == name]
    native.select()
    return names


@contextmanager
def using(instruction_set: str) -> Iterator[None]:
    """The kernels of one instruction set inside the block, the best ones after it."""
    assert native.select(instruction_set) == instruction_set
    try:
        yield
    finally:
        native.select()


def random_blocks(
    rng: np.random.Generator, kind: GGMLType, shape: tuple[int, int], low: float = 0.25, high: float = 16.0
) -> np.ndarray:
    """Random bytes in which the largest magnitude of each block lies in [low, high).

    No value is subnormal: XLA makes these zero on CPUs.
    """
    block = BLOCK_SIZES[kind]
    count = shape[0] * shape[1] // block.elements
    kept = np.zeros((0, block.nbytes), np.uint8)
    while len(kept) < count:
        data = rng.integers(0, 256, (16 * count + 64, block.nbytes), np.uint8)
        values = np.abs(quant.dequantize(data.reshape(-1), kind, (len(data), block.elements)))
        most = values.max(axis=1)  # NaN where a value is
        is_good = (low <= most) & (most < high) & ((values == 0) | (values >= SMALLEST)).all(axis=1)
        kept = np.concatenate([kept, data[is_good]])
    return kept[:count].reshape(-1)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def paired_keys(bits: np.ndarray) -> np.ndarray:
    """bf16's bits [S, K, C, H] as the kernels keep keys: uint32 [S, K, C / 64, H / 2, 64]."""
    S, K, C, H = bits.shape
    pairs = np.ascontiguousarray(bits).view(np.uint32).reshape(S, K, C // 64, 64, H // 2)
    return np.ascontiguousarray(pairs.swapaxes(3, 4))


def paired_values(bits: np.ndarray) -> np.ndarray:
    """bf16's bits [S, K, C, H] as the kernels keep values: uint32 [S, K, C / 64, 32, H]."""
    S, K, C, H = bits.shape
    two = bits.reshape(S, K, C // 64, 32, 2, H).astype(np.uint32)
    return two[:, :, :, :, 0] | two[:, :, :, :, 1] << np.uint32(16)
