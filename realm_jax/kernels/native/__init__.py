"""The CPU kernels written in C++, as XLA custom calls; `problem` says why they are not there, if so.

The library is built with the package, against the oldest jaxlib that the package supports, and picks the
instruction set when it is loaded.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import jax

TARGETS = (
    "realm_matmul",
    "realm_matmul_bf16",
    "realm_rms_norm",
    "realm_grouped_matmul",
    "realm_grouped_matmul_bf16",
    "realm_rotate",
    "realm_attention",
    "realm_cache_write",
    "realm_cache_write_int8",
    "realm_extend",
    "realm_low_rank",
)
INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "neon")


@functools.cache
def problem() -> str | None:
    """Why the kernels cannot be used in this process; None where they are ready."""
    try:
        loaded = library()
        targets = {name: getattr(loaded, name) for name in TARGETS}
    except (OSError, ImportError) as error:
        return str(error)
    except AttributeError as error:
        return f"the library is older than the package ({error}); install realm-jax again"
    if loaded.realm_ffi_version() > _runtime_version():
        jaxlib = importlib.metadata.version("jaxlib")
        return f"they were built for a newer jaxlib than {jaxlib}; install realm-jax again"
    if select() is None:
        return f"this processor has none of their instruction sets ({', '.join(INSTRUCTION_SETS)})"
    for name, target in targets.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(target), platform="cpu")
    return None


def select(instruction_set: str | None = None) -> str | None:
    """The instruction set that the kernels use from now on, the best without a name; None: not available."""
    name = library().realm_select(None if instruction_set is None else instruction_set.encode())
    return None if name is None else name.decode()


@functools.cache
def library() -> ctypes.CDLL:
    """The library; `problem` says whether it may be used. Raises ImportError if it was not built."""
    # Built as an extension, for the platform's file name, but no module: there is nothing to import in it.
    spec = importlib.util.find_spec("realm_jax.kernels.native.library")
    if spec is None or spec.origin is None:
        raise ImportError("they were not built when realm-jax was installed, which takes a C++ compiler")
    loaded = ctypes.CDLL(spec.origin)
    loaded.realm_select.argtypes, loaded.realm_select.restype = [ctypes.c_char_p], ctypes.c_char_p
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    loaded.realm_tile.argtypes = [ctypes.c_int, pointer, number, number, pointer, number, number, number]
    loaded.realm_tile.restype = ctypes.c_bool
    return loaded


def _runtime_version() -> int:
    """The version of XLA's interface for custom calls, as `realm_ffi_version` counts."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = (
        int(found[1]) if (found := re.search(rf"#define XLA_FFI_API_{part} (\d+)", header)) else 0
        for part in ("MAJOR", "MINOR")
    )
    return major * 1000 + minor
