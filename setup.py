"""The optional C++ kernels: without a compiler the package installs all the same, and says so when it runs."""

import importlib.util
import platform
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("realm_jax/kernels/native")


def native_kernels() -> list[Extension]:
    """The kernels, where this processor is one they are written for."""
    jaxlib = importlib.util.find_spec("jaxlib")
    if platform.machine().lower() not in ("x86_64", "amd64") or jaxlib is None or jaxlib.origin is None:
        return []
    include = Path(jaxlib.origin).parent / "include"
    return [
        Extension(
            "realm_jax.kernels.native.library",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in (*NATIVE.glob("*.h"), *NATIVE.glob("*.inl"))),
            # no contraction: a sum's bits must not depend on what the compiler fuses
            extra_compile_args=["-std=c++17", "-O2", "-g0", "-ffp-contract=off", "-isystem", str(include)],
            language="c++",
            optional=True,
        )
    ]


setup(ext_modules=native_kernels())
