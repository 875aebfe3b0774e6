"""The optional C++ kernels: without a compiler the package installs all the same, and says so later."""

import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("realm_jax/kernels/native")
SHARED = ("ffi", "ffi_matmul", "ffi_cache", "ffi_low_rank", "tiling")
VECTORS = {  # by processor: its instruction sets, and what they take to be compiled
    "x86_64": (["avx512bf16", "avx512", "avx2"], []),
    "aarch64": (["neon"], ["-march=armv8.2-a+dotprod"]),
}


def native_kernels() -> list[Extension]:
    """The kernels, where this processor is one they are written for."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(name := platform.machine().lower(), name)
    jaxlib = importlib.util.find_spec("jaxlib")
    if machine not in VECTORS or jaxlib is None or jaxlib.origin is None:
        return []
    sets, flags = VECTORS[machine]
    include = Path(jaxlib.origin).parent / "include"
    return [
        Extension(
            "realm_jax.kernels.native.library",
            sources=[str(NATIVE / f"{name}.cpp") for name in (*SHARED, *sets)],
            depends=sorted(str(path) for kind in ("cpp", "h", "inl") for path in NATIVE.glob(f"*.{kind}")),
            # no contraction: a sum's bits must not depend on what the compiler fuses
            extra_compile_args=[
                "-std=c++17",
                "-O2",
                "-g0",
                "-ffp-contract=off",
                "-isystem",
                str(include),
                *flags,
            ],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=native_kernels())
