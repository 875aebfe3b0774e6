"""Attention over a slot cache: what it takes, beside other implementations and the bound of the device."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_device import Device

from realm_jax.kernels import blockwise, reference
from realm_jax.kernels.pallas import attention as chosen
from realm_jax.kernels.pallas import attention_gpu, attention_tpu, tuning


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens, the last of which makes the row `length` long."""

    B: int
    T: int
    length: int
    C: int
    N: int = 32
    K: int = 8
    H: int = 128
    dtype: str = "bfloat16"
    window: int | None = None

    @property
    def seen(self) -> int:
        """Pairs of a query and a position that it sees, of one row and head."""
        ends = np.arange(self.length - self.T, self.length) + 1
        return int(np.minimum(ends, self.window or self.length).sum())

    @property
    def positions_read(self) -> int:
        """Of one row and kv head."""
        return self.length if self.window is None else min(self.length, self.window + self.T - 1)

    def bound(self, where: Device) -> float | None:
        head = self.H * jnp.dtype(self.dtype).itemsize + (4 if self.dtype == "int8" else 0)
        cache = 2 * self.B * self.K * self.positions_read * head
        around = 2 * 4 * self.B * self.T * self.N * self.H
        return where.bound(cache + around, 4 * self.B * self.N * self.H * self.seen)


SHAPES = {
    "decode, 1 row": Shape(1, 1, 4096, 4096),
    "decode, 1 long row": Shape(1, 1, 32768, 32768),
    "decode, 32 rows": Shape(32, 1, 2048, 4096),
    "decode, 32 rows, int8": Shape(32, 1, 2048, 4096, dtype="int8"),
    "decode, 16 rows, heads of 64": Shape(16, 1, 2048, 4096, 32, 8, 64),
    "decode, 16 rows, heads of 256, window": Shape(16, 1, 4096, 4096, 8, 4, 256, window=1024),
    "verify, 8 rows of 5": Shape(8, 5, 2048, 4096),
    "prefill": Shape(1, 2048, 2048, 4096),
    "prefill, heads of 64": Shape(1, 2048, 2048, 4096, 32, 8, 64),
    "prefill, heads of 256, window": Shape(1, 2048, 2048, 4096, 8, 4, 256, window=1024),
    "prefill, int8": Shape(1, 2048, 2048, 4096, dtype="int8"),
    "8 tiles of 64": Shape(8, 64, 2048, 4096),
}
INTERPRETED = {
    "decode": Shape(2, 1, 100, 128, 4, 2, 32, "float32"),
    "prefill": Shape(1, 64, 64, 128, 4, 2, 32, "float32"),
}
TOLERANCE = 0.03


def measure(where: Device, rounds: int) -> list[dict[str, Any]]:
    """A row for each shape: microseconds of each implementation, and the bound."""
    shapes = INTERPRETED if where.target.interpret else SHAPES
    return [_row(name, shape, where, rounds) for name, shape in shapes.items()]


def _row(name: str, shape: Shape, where: Device, rounds: int) -> dict[str, Any]:
    q, rest = _arrays(shape)
    taken = {
        who: 1e6 * where.seconds(call, q, given, rounds)
        for who, (call, given) in _implementations(shape, rest, where).items()
    }
    bound = shape.bound(where)
    return {
        "kernel": "attention",
        "name": name,
        **asdict(shape),
        "blocks": dict(_sizes(shape, where)),
        "microseconds": {who: round(time, 2) for who, time in taken.items()},
        "bound_microseconds": None if bound is None else round(1e6 * bound, 2),
        "of_bound": None if bound is None else round(1e6 * bound / taken["pallas"], 3),
    }


def _arrays(shape: Shape) -> tuple[jax.Array, tuple[Any, ...]]:
    """q, and the other arguments of attention."""
    rng = np.random.default_rng(0)
    size = (shape.B, shape.K, shape.C, shape.H)
    if shape.dtype == "int8":
        kv = [jnp.asarray(rng.integers(-127, 128, size, np.int8)) for _ in "kv"]
        scales = [jnp.full(size[:3], 0.01, jnp.float32)] * 2
    else:
        kv = [jnp.asarray(rng.standard_normal(size, np.float32), shape.dtype) for _ in "kv"]
        scales = [None, None]
    q = jnp.asarray(rng.standard_normal((shape.B, shape.T, shape.N, shape.H), np.float32))
    first = shape.length - shape.T
    positions = jnp.tile(jnp.arange(first, shape.length, dtype=jnp.int32), (shape.B, 1))
    return q, (*kv, *scales, jnp.arange(shape.B, dtype=jnp.int32), positions)


def _implementations(shape: Shape, rest: tuple[Any, ...], where: Device) -> dict[str, tuple[Any, Any]]:
    """Name -> function of q and arrays, and these arrays."""
    how = _how(shape)
    found = {
        "pallas": (lambda q, rest: chosen.attention(q, *rest, **how), rest),
        "xla": (lambda q, rest: blockwise.attention(q, *rest, **how), rest),
        "reference": (lambda q, rest: reference.cached_attention(q, *rest, **how), rest),
    }
    if where.target.platform == "gpu" and not where.target.interpret and _suits_cudnn(shape):
        found["cudnn"] = (_cudnn(shape), tuple(x.transpose(0, 2, 1, 3) for x in rest[:2]))
    return found


def _suits_cudnn(shape: Shape) -> bool:
    """Its causal mask, and windows, begin at position 0."""
    is_aligned = shape.length == shape.T or (shape.T == 1 and shape.window is None)
    return shape.dtype == "bfloat16" and is_aligned


def _cudnn(shape: Shape) -> Any:
    """Of keys and values [B, C, K, H], as cuDNN wants them."""
    window = None if shape.window is None else (shape.window - 1, 0)
    lengths = jnp.full(shape.B, shape.length, jnp.int32)

    def call(q: jax.Array, kv: tuple[jax.Array, jax.Array]) -> jax.Array:
        k, v = kv if shape.T == 1 else (x[:, : shape.length] for x in kv)
        out = jax.nn.dot_product_attention(
            q.astype(k.dtype),
            k,
            v,
            key_value_seq_lengths=lengths if shape.T == 1 else None,
            is_causal=shape.T > 1,
            local_window_size=window,
            implementation="cudnn",
        )
        return out.astype(q.dtype)

    return call


def _bucket(shape: Shape) -> str:
    return chosen.bucket(shape.T, shape.H, jnp.dtype(shape.dtype))


def _sizes(shape: Shape, where: Device) -> tuning.Sizes:
    return tuning.sizes(f"attention_{where.target.platform}", where.kind, _bucket(shape))


def tune(where: Device, rounds: int) -> dict[str, dict[str, tuning.Sizes]]:
    """The block sizes that take the least time: over the shapes of a bucket, the sum of time to best time."""
    buckets: dict[str, list[Shape]] = {}
    for shape in (INTERPRETED if where.target.interpret else SHAPES).values():
        buckets.setdefault(_bucket(shape), []).append(shape)
    found = {name: _fastest(name, shapes, where, rounds) for name, shapes in buckets.items()}
    return {f"attention_{where.target.platform}": found}


def _fastest(bucket: str, shapes: list[Shape], where: Device, rounds: int) -> tuning.Sizes:
    usual = _sizes(shapes[0], where)
    candidates = [usual, *(c for c in _candidates(bucket, where) if c != usual)]
    times = []
    for shape in shapes:
        q, rest = _arrays(shape)
        expected = jax.jit(blockwise.attention, static_argnums=(7, 8, 9))(q, *rest, *_how(shape).values())
        times.append([_taken(c, shape, q, rest, expected, where, rounds) for c in candidates])
    relative = np.nan_to_num([row / np.min(row) for row in times], nan=1.0)  # NaN: no candidate runs
    return candidates[int(relative.sum(axis=0).argmin())]


def _candidates(bucket: str, where: Device) -> Iterator[dict[str, int]]:
    if where.target.interpret:
        yield {"rows": 64, "positions": 64, "split": 0, "warps": 4, "stages": 1}
        return
    is_decode = bucket.startswith("decode")
    if where.target.platform == "tpu":
        for rows, positions in itertools.product((64, 128, 256, 512), (128, 256, 512, 1024)):
            yield {"rows": rows, "positions": positions}
        return
    rows, splits = ((16, 64), (128, 256, 512, 1024)) if is_decode else ((64, 128), (0,))
    for r, p, split, warps, stages in itertools.product(rows, (32, 64, 128), splits, (4, 8), (2, 3, 4)):
        yield {"rows": r, "positions": p, "split": split, "warps": warps, "stages": stages}


def _how(shape: Shape) -> dict[str, Any]:
    return {"scale": shape.H**-0.5, "softcap": None, "window": shape.window}


def _taken(
    sizes: tuning.Sizes,
    shape: Shape,
    q: jax.Array,
    rest: tuple[Any, ...],
    expected: jax.Array,
    where: Device,
    rounds: int,
) -> float:
    """Seconds; infinity for sizes that the device refuses or whose result is wrong."""
    kind = attention_tpu.Blocks if where.target.platform == "tpu" else attention_gpu.Blocks

    def call(q: jax.Array, rest: tuple[Any, ...]) -> jax.Array:
        return chosen.attention(q, *rest, **_how(shape), blocks=kind(**sizes))

    try:
        off = float(jnp.abs(jax.jit(call)(q, rest) - expected).max())
        if not off < TOLERANCE:
            print(f"{shape} {dict(sizes)}: off by {off}", file=sys.stderr)
            return float("inf")
        return where.seconds(call, q, rest, rounds)
    except jax.errors.JaxRuntimeError as problem:  # too much shared memory, most often
        print(f"{shape} {dict(sizes)}: {str(problem).splitlines()[0]}", file=sys.stderr)
        return float("inf")
