"""The C++ library in a process: its threads, its errors, and what is said where it is missing."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import realm
from native_cases import require_native

from realm_jax import RequestError, UnsupportedError, runtime
from realm_jax.config import EngineConfig
from realm_jax.kernels import native
from realm_jax.kernels.native import calls
from realm_jax.kernels.tiles import TileFormat

require_native()

THREADS = """
import hashlib
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from realm_jax.ggml import GGMLType
from realm_jax.kernels import native
from realm_jax.kernels.native import calls
from realm_jax.quant.containers import pack
from realm_jax.quant.tiling import tile
assert native.problem() is None
rng, digest = np.random.default_rng(0), hashlib.sha256()
def normal(*shape): return jnp.asarray(rng.standard_normal(shape).astype(np.float32))
def add(*results): [digest.update(np.asarray(x).tobytes()) for x in results]
blocks = rng.integers(0, 256, (2053 * 16, 20), np.uint8)
blocks[:, :4] = np.array([0.01, -0.08], np.float16).view(np.uint8)
tiles, form = tile(pack(blocks.reshape(-1), GGMLType.Q4_1, (2053, 512)))
for rows in (1, 7, 200):
    add(calls.tiles_matmul(normal(rows, 512), jnp.asarray(tiles), form, 2053))
    add(calls.matmul(normal(rows, 512), normal(301, 512).astype(jnp.bfloat16)))
add(calls.rms_norm(normal(300, 515), normal(515), 1e-5))
def bits(*shape): return jnp.asarray(rng.integers(0, 2**14, shape).astype(np.uint16).view(np.uint32))
keys, values = bits(5, 2, 4, 32, 128), bits(5, 2, 4, 32, 128)
positions = jnp.asarray((rng.integers(0, 200, (5, 1)) + np.arange(40)).astype(np.int32))
how = {"scale": 1e-3, "softcap": None, "window": None}
add(calls.attention(normal(5, 40, 6, 64), keys, values, None, None, None, positions, **how))
add(calls.write_cache(normal(5, 40, 2, 64) + 1, None, positions, keys, is_keys=True))
new = normal(5, 40, 10, 64), normal(5, 40, 32), normal(5, 40, 32)
out, kept = calls.extend(*new, False, None, positions, (keys, values), **how)
add(out, *kept)
names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print(digest.hexdigest(), names.count("tf_XLAEigen"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_bits_do_not_depend_on_the_number_of_threads():
    wanted, found = (1, 2, 3, 7), []
    running = [
        subprocess.Popen(
            [sys.executable, "-c", THREADS],
            env={**os.environ, "NPROC": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for threads in wanted
    ]
    ended = [(process.communicate(timeout=300), process.returncode) for process in running]
    for (out, err), code in ended:
        assert code == 0, err[-3000:]
        found.append(out.split())
    assert [int(threads) for _, threads in found] == list(wanted)
    assert len({digest for digest, _ in found}) == 1


def call(name: str, result: tuple[int, ...], *arguments: Any, dtype: Any = jnp.float32, **how: Any) -> None:
    shape = jax.ShapeDtypeStruct(result, dtype)
    jax.block_until_ready(jax.ffi.ffi_call(name, shape)(*arguments, **how))


def ones(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.ones(shape, dtype)


Q4_0 = TileFormat(64, 32, 32, 4, (), 8, "float16", has_bytes=False, has_minimum=False)


@pytest.mark.parametrize(
    ("x", "tiles"),
    [
        ((2, 32), (1, Q4_0.record)),  # inputs
        ((2, 128), (1, Q4_0.record)),
        ((2, 64), (2, Q4_0.record)),  # outputs
        ((2, 64), (0, Q4_0.record)),
        ((2, 64), (1, Q4_0.record - 64)),  # the record
        ((2, 64), (1, Q4_0.record + 64)),
        ((2, 48), (1, Q4_0.record)),  # no whole blocks
    ],
)
def test_tiles_of_another_matrix_raise(x: tuple[int, int], tiles: tuple[int, int]):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: realm_matmul"):
        jax.block_until_ready(calls.tiles_matmul(ones(*x), ones(*tiles, dtype=jnp.uint8), Q4_0, 16))


BF16, PAIRS = jnp.bfloat16, jnp.uint32


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (ones(2, 64), ones(8, 32, dtype=BF16)),  # a shorter row
        (ones(2, 64), ones(7, 64, dtype=BF16)),  # fewer outputs than y
        (ones(2, 64), ones(8, 64)),  # float32
        (ones(2, 40), ones(8, 40, dtype=BF16)),  # no whole blocks
    ],
)
def test_a_bf16_weight_that_does_not_fit_raises(x: jax.Array, weight: jax.Array):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: realm_matmul_bf16"):
        call("realm_matmul_bf16", (2, 8), x, weight)


@pytest.mark.parametrize("features", [4, 1, 6, 15])
def test_factors_of_another_norm_raise(features: int):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: realm_rms_norm"):
        call("realm_rms_norm", (3, 5), ones(3, 5), ones(features), eps=np.float32(1e-5))


Q, CODES = ones(2, 3, 4, 32), ones(2, 2, 64, 32, dtype=jnp.int8)
KEYS, VALUES = ones(2, 2, 1, 16, 64, dtype=PAIRS), ones(2, 2, 1, 32, 32, dtype=PAIRS)
NONE, NO_SLOTS, AT = ones(0), ones(0, dtype=jnp.int32), ones(2, 3, dtype=jnp.int32)
SCALES = ones(2, 2, 64)
HOW = {"scale": np.float32(1), "softcap": np.float32(0), "window": np.int64(0)}


@pytest.mark.parametrize(
    "arguments",
    [
        (Q, KEYS[:, :, :, :8], VALUES[..., :16], NONE, NONE, NONE, NO_SLOTS, AT),  # head dim
        (Q, KEYS[:, :, :, :12], VALUES[..., :24], NONE, NONE, NONE, NO_SLOTS, AT),  # no whole vectors
        (
            Q,
            ones(2, 3, 1, 16, 64, dtype=PAIRS),
            ones(2, 3, 1, 32, 32, dtype=PAIRS),
            NONE,
            NONE,
            NONE,
            NO_SLOTS,
            AT,
        ),
        (Q, KEYS[..., :48], VALUES[:, :, :, :24], NONE, NONE, NONE, NO_SLOTS, AT),  # no whole blocks
        (Q, CODES[:, :, :48], CODES[:, :, :48], SCALES[:, :, :48], SCALES[:, :, :48], NONE, NO_SLOTS, AT),
        (Q, KEYS, VALUES[:1], NONE, NONE, NONE, NO_SLOTS, AT),  # values of another shape
        (Q, VALUES, KEYS, NONE, NONE, NONE, NO_SLOTS, AT),  # taken for each other
        (Q, CODES, CODES, NONE, NONE, NONE, NO_SLOTS, AT),  # codes without scales
        (Q, CODES, CODES, SCALES, NONE, NONE, NO_SLOTS, AT),
        (Q, CODES, CODES, SCALES[:, :, :32], SCALES[:, :, :32], NONE, NO_SLOTS, AT),
        (Q, KEYS, VALUES, SCALES, SCALES, NONE, NO_SLOTS, AT),  # scales without codes
        (Q, KEYS, CODES, NONE, NONE, NONE, NO_SLOTS, AT),
        (Q, KEYS, VALUES, NONE, NONE, NONE, AT[0, :1], AT),  # fewer slots than rows
        (Q, KEYS, VALUES, NONE, NONE, NONE, NO_SLOTS, AT[:1]),  # fewer positions than queries
        (Q, KEYS, VALUES, NONE, NONE, NONE, NO_SLOTS, AT[:, :2]),
        (Q, KEYS, VALUES, NONE, NONE, ones(3), NO_SLOTS, AT),  # fewer sinks than heads
    ],
)
def test_a_cache_that_does_not_fit_raises(arguments: tuple[jax.Array, ...]):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: realm_attention"):
        call("realm_attention", Q.shape, *arguments, **HOW)


def test_the_call_that_fits_does_not_raise():
    call("realm_attention", Q.shape, Q, KEYS, VALUES, NONE, NONE, NONE, NO_SLOTS, AT, **HOW)
    call("realm_attention", Q.shape, Q, KEYS, VALUES, NONE, NONE, ones(4), NO_SLOTS, AT, **HOW)
    call("realm_matmul_bf16", (2, 8), ones(2, 64), ones(8, 64, dtype=BF16))


@pytest.mark.parametrize(
    ("x", "slots", "positions"),
    [
        (ones(2, 3, 2, 16), NO_SLOTS, AT),  # head dim
        (ones(2, 3, 4, 32), NO_SLOTS, AT),  # heads
        (ones(2, 3, 2, 32), AT[0, :1], AT),  # slots
        (ones(2, 3, 2, 32), NO_SLOTS, AT[:1]),  # positions
    ],
)
def test_keys_that_do_not_fit_the_cache_raise(x: jax.Array, slots: jax.Array, positions: jax.Array):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: realm_cache_write"):
        target = jax.ShapeDtypeStruct(KEYS.shape, KEYS.dtype)
        write = jax.ffi.ffi_call("realm_cache_write", target, input_output_aliases={3: 0})
        jax.block_until_ready(write(x, slots, positions, KEYS, is_keys=True))


HEADS, TURNS = ones(2, 3, 8, 32), ones(2, 3, 16)  # of 4 queries, 2 keys and 2 values


@pytest.mark.parametrize(
    ("heads", "turns", "slots", "positions", "cache"),
    [
        (ones(2, 3, 8, 16), TURNS, NO_SLOTS, AT, (KEYS, VALUES)),  # head dim
        (ones(2, 3, 4, 32), TURNS, NO_SLOTS, AT, (KEYS, VALUES)),  # no queries
        (ones(2, 3, 7, 32), TURNS, NO_SLOTS, AT, (KEYS, VALUES)),  # no whole groups
        (HEADS, ones(2, 3, 17), NO_SLOTS, AT, (KEYS, VALUES)),  # turns of more than a head
        (HEADS, ones(2, 1, 16), NO_SLOTS, AT, (KEYS, VALUES)),
        (HEADS, TURNS, AT[0, :1], AT, (KEYS, VALUES)),  # fewer slots than rows
        (HEADS, TURNS, NO_SLOTS, AT[:1], (KEYS, VALUES)),  # fewer positions than tokens
        (HEADS, TURNS, NO_SLOTS, AT, (KEYS, VALUES[:1])),
        (HEADS, TURNS, NO_SLOTS, AT, (CODES, CODES)),  # codes without scales
        (HEADS, TURNS, NO_SLOTS, AT, (KEYS, VALUES, SCALES, SCALES)),  # scales without codes
    ],
)
def test_heads_that_do_not_fit_the_cache_raise(
    heads: jax.Array, turns: jax.Array, slots: jax.Array, positions: jax.Array, cache: tuple[jax.Array, ...]
):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT: realm_extend"):
        kept = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in cache]
        out = jax.ShapeDtypeStruct((2, 3, max(heads.shape[2] - 4, 0), heads.shape[3]), jnp.float32)
        aliases = {5 + i: 1 + i for i in range(len(cache))}
        extend = jax.ffi.ffi_call("realm_extend", [out, *kept], input_output_aliases=aliases)
        none = [NONE] * (5 - len(cache))  # no scales, no sinks
        places = slots, positions
        jax.block_until_ready(extend(heads, turns, turns, *places, *cache, *none, interleaved=False, **HOW))


def test_a_cache_that_is_not_written_in_place_raises():
    kept = [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (Q, KEYS, VALUES)]
    call = jax.ffi.ffi_call("realm_extend", kept, input_output_aliases={5: 1})
    with pytest.raises(jax.errors.JaxRuntimeError, match="not written in place"):
        places = NO_SLOTS, AT
        turns = TURNS, TURNS
        jax.block_until_ready(
            call(HEADS, *turns, *places, KEYS, VALUES, NONE, NONE, NONE, interleaved=False, **HOW)
        )


def test_the_numerics_that_native_kernels_allow(monkeypatch: pytest.MonkeyPatch):
    def numerics(**options: Any) -> tuple[str, ...]:
        found = runtime.resolve_numerics(EngineConfig(**options))
        return found.dtype, found.kv_dtype, found.weights, found.kernels

    assert numerics() == ("bfloat16", "bfloat16", "quantized", "native")
    assert numerics(kernels="xla") == ("bfloat16", "bfloat16", "dense", "xla")
    assert numerics(dtype="float32") == ("float32", "float32", "dense", "xla")
    assert numerics(weights="dense") == ("bfloat16", "bfloat16", "dense", "native")
    assert numerics(kv_dtype="int8") == ("bfloat16", "int8", "quantized", "native")
    with pytest.raises(
        RequestError, match="multiply in int8 and bf16; use dtype='bfloat16' or kernels='xla'"
    ):
        numerics(kernels="native", dtype="float32")
    monkeypatch.setattr(native, "problem", lambda: "they are on holiday")
    assert numerics() == ("bfloat16", "bfloat16", "dense", "xla")
    with pytest.raises(UnsupportedError, match=r"cannot be used: they are on holiday \(kernels='xla'\)"):
        numerics(kernels="native")


def test_why_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch):
    problem = native.problem.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(native, "_runtime_version", lambda: 0)
        jaxlib = importlib.metadata.version("jaxlib")
        wanted = f"they were built for a newer jaxlib than {jaxlib}; install realm-jax again"
        assert problem() == wanted
    with monkeypatch.context() as patch:
        patch.setattr(native, "select", lambda: None)
        assert "this processor has none of their instruction sets" in (problem() or "")
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", native.library.__wrapped__)
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert problem() == "they were not built when realm-jax was installed, which takes a C++ compiler"
    assert problem() is None


@pytest.mark.parametrize("missing", [None, "they were not built"])
def test_doctor_says_which_kernels_there_are(monkeypatch: pytest.MonkeyPatch, missing: str | None):
    monkeypatch.setattr(native, "problem", lambda: missing)
    done = realm("doctor", "--json")
    assert done.code == 0, done.err
    facts = json.loads(done.out)
    if missing is None:
        wanted = "native", f"this processor has {native.select()}"
    else:
        wanted = "xla", f"the C++ kernels cannot be used: {missing}"
    assert (facts["kernels"], facts["kernels_because"]) == wanted
