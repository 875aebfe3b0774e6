"""llama.cpp's quantizer, through llama-cpp-python's low-level API (`pip install llama-cpp-python`)."""

import ctypes
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.quantization.file_types import FileType

FLOATS = ctypes.POINTER(ctypes.c_float)


def encode(rows: np.ndarray, kind: GGMLType, importance: np.ndarray | None = None) -> np.ndarray:
    """The rows as ggml_quantize_chunk stores them."""
    library = ctypes.CDLL(str(Path(_api().__file__).parent / "lib" / "libggml-base.so"))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, FLOATS, ctypes.c_void_p, *[ctypes.c_int64] * 3, FLOATS]
    block, rows = BLOCK_SIZES[kind], np.ascontiguousarray(rows, np.float32)
    out = np.zeros((len(rows), rows.shape[1] // block.elements * block.nbytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data_as(FLOATS)
    quantize(int(kind), rows.ctypes.data_as(FLOATS), out.ctypes.data, 0, *rows.shape, pointer)
    return out


def quantize(
    source: Path,
    target: Path,
    file_type: FileType,
    means: Mapping[str, np.ndarray] | None = None,
    *,
    threads: int = 0,
    pure: bool = False,
) -> None:
    """`target` holds the model as llama_model_quantize writes it. means: an importance matrix by tensor."""
    api = _api()
    params = api.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type.number, threads, True
    params.pure = pure
    if file_type.is_uniform:  # which llama.cpp has no name for
        params.pure, params.output_tensor_type, params.token_embedding_type = True, 8, 8
    entries = None
    if means is not None:
        arrays = {name.encode(): np.ascontiguousarray(values, np.float32) for name, values in means.items()}
        entries = (api.llama_model_imatrix_data * (len(arrays) + 1))()
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.data, entry.size = name, values.ctypes.data_as(FLOATS), values.size
        params.imatrix = entries
    if api.llama_model_quantize(bytes(source), bytes(target), ctypes.byref(params)):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def _api() -> Any:
    api = importlib.import_module("llama_cpp.llama_cpp")
    silent = api.llama_log_callback(lambda level, text, data: None)
    SILENT.append(silent)
    api.llama_log_set(silent, None)
    return api


SILENT: list[Any] = []
"""What llama.cpp calls has to live."""
