"""Seeded mutations of a small GGUF file, and the law that each of them has to keep.

Run as a program, it checks N mutations under a cap on memory: `python tests/mutations.py LAW N [FIRST_SEED]`,
where LAW is `container` (open the file, expand every tensor) or `model` (load it whole).
"""

import json
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tiny import write_model

from realm_jax import gguf, inspection, quant, weights
from realm_jax.config import EngineConfig
from realm_jax.errors import ModelFileError, UnsupportedError
from realm_jax.ggml import BLOCK_SIZES
from realm_jax.loading import load_model

EXTREMES = [0, 1, 2, 3, 7, 8, 9, 77, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
EXTREMES += [2**61 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8]
MEMORY_CAP = 200 * 2**20  # bytes above what the process holds before the first file


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def seed_file() -> bytes:
    """A valid file with every type of value and every type of tensor, one block each."""
    scalars = [(kind, struct.pack(f"<{code}", 1)) for kind, code in enumerate("BbHhIif?")]
    scalars += [(10, struct.pack("<Q", 1)), (11, struct.pack("<q", -1)), (12, struct.pack("<d", 0.5))]
    values = [(struct.pack("<I", kind), value) for kind, value in [*scalars, (8, text(b"a string"))]]
    values += [(struct.pack("<IIQ", 9, kind, 3), 3 * value) for kind, value in scalars]
    values += [(struct.pack("<IIQ", 9, 8, 3), text(b"one") + text(b"") + text("drei ß".encode()))]
    keys = [text(f"key.{number}".encode()) + kind + value for number, (kind, value) in enumerate(values)]
    keys.append(text(b"general.alignment") + struct.pack("<II", 4, 64))
    infos, data = [], b""
    for number, (kind, block) in enumerate(BLOCK_SIZES.items()):
        dims = [block.elements, *[1, 2, 3][: number % 4]]
        shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        infos.append(text(kind.name.encode()) + shape + struct.pack("<IQ", kind, len(data)))
        nbytes = block.nbytes * int(np.prod(dims[1:]))
        data += np.random.default_rng(kind).bytes(nbytes).ljust(-(-nbytes // 64) * 64, b"\0")
    header = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys)) + b"".join(keys + infos)
    return header.ljust(-(-len(header) // 64) * 64, b"\0") + data


def mutate(source: bytes, seed: int) -> bytes:
    """`source` with one to four faults, mostly in its header, the same ones for the same seed."""
    rng = np.random.default_rng(seed)
    result = bytearray(source)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, max(1, len(result) // int(rng.choice([1, 2, 100])))))
        match rng.integers(0, 6):
            case 0:
                result[at : at + 1] = bytes([rng.integers(0, 256)])
            case 1:
                result[at : at + 1] = bytes([(result[at : at + 1] or b"\0")[0] ^ 1 << rng.integers(0, 8)])
            case 2:
                del result[at:]
            case 3:
                del result[at : at + int(rng.integers(1, 64))]
            case 4:
                start = int(rng.integers(0, len(source)))
                result[at:at] = source[start : start + int(rng.integers(1, 64))]
            case _:
                width = int(rng.choice([4, 8]))
                value = int(rng.choice(np.array(EXTREMES, object))) + int(rng.integers(-1, 2))
                result[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    return bytes(result)


def model_file() -> bytes:
    """A valid llama model with a vocabulary and a chat template."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        return write_model(path, layers=1, width=8, heads=2, kv_heads=1, ffn=8).read_bytes()


def open_container(path: Path) -> None:
    """Every tensor of the file can be expanded."""
    with gguf.open(path) as file:
        for name, info in file.tensors.items():
            data = file.data(name)
            assert data.nbytes == info.nbytes <= file.nbytes
            assert quant.dequantize(data, info.ggml_type, info.shape).shape == info.shape


def load_whole(path: Path) -> None:
    """The file gives weights on the device, a tokenizer that encodes, and what `inspect` prints."""
    model = load_model(path, EngineConfig(dtype="float32"))
    assert weights.resident_bytes(model.params) > 0
    model.tokenizer.decode(model.tokenizer.encode("a word"))
    with gguf.open(path) as file:
        json.dumps(inspection.describe(file))
        inspection.check(file)


LAWS = {"container": (seed_file, open_container), "model": (model_file, load_whole)}


def outcome(attempt: Callable[[Path], None], path: Path) -> str:
    """What became of the file: the error's name, or "opened"."""
    try:
        attempt(path)
    except (ModelFileError, UnsupportedError) as error:
        assert len(str(error).splitlines()) == 1, f"not one line: {error}"
        return type(error).__name__
    return "opened"


def run(law: str, count: int, first_seed: int = 0) -> dict[str, float]:
    """How many of the mutations ended in which way, and the longest time one took, in seconds."""
    make, attempt = LAWS[law]
    source = make()
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutation.gguf"
        path.write_bytes(source)
        attempt(path)  # the file before its mutation has to be valid
        cap_memory()
        for seed in range(first_seed, first_seed + count):
            path.write_bytes(mutate(source, seed))
            start = time.perf_counter()
            try:
                outcomes[outcome(attempt, path)] += 1
            except BaseException as error:
                error.add_note(f"mutation with seed {seed}")
                raise
            slowest = max(slowest, time.perf_counter() - start)
    return {**outcomes, "slowest_s": slowest}


def cap_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_CAP, resource.RLIM_INFINITY))


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))))
