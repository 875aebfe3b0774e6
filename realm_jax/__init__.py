"""realm_jax: GGUF language models, compiled by JAX.

The names below load on first use, so that importing the package costs nothing.
"""

import time
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realm_jax.errors import (
        CapacityError,
        DownloadError,
        ModelFileError,
        RealmError,
        RequestError,
        UnsupportedError,
    )
    from realm_jax.llm import LLM
    from realm_jax.params import SamplingParams
    from realm_jax.structured import StructuredOutput

__version__ = "0.1.0"
IMPORTED = time.time()
"""When this process began to read the package."""

_HOME = {
    "LLM": "llm",
    "SamplingParams": "params",
    "StructuredOutput": "structured",
    "RealmError": "errors",
    "ModelFileError": "errors",
    "UnsupportedError": "errors",
    "RequestError": "errors",
    "CapacityError": "errors",
    "DownloadError": "errors",
}

__all__ = [
    "LLM",
    "CapacityError",
    "DownloadError",
    "ModelFileError",
    "RealmError",
    "RequestError",
    "SamplingParams",
    "StructuredOutput",
    "UnsupportedError",
    "__version__",
]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
