"""Writes golden_encodings.npz: rows as llama.cpp's quantizer stores them (needs llama-cpp-python)."""

from pathlib import Path

import llama_quantizer
import numpy as np

from realm_jax.ggml import GGMLType
from realm_jax.quant.encoding import ENCODERS

GOLDEN = Path(__file__).with_name("golden_encodings.npz")
COLUMNS = 256
NUMBERS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def rows() -> np.ndarray:
    """Rows as models have them, and rows that are at an end of what can be."""
    rng = np.random.default_rng(0)
    normal, heavy = rng.standard_normal((2, COLUMNS)), rng.standard_t(3, (2, COLUMNS))
    outliers, half = 1e-3 * rng.standard_normal(COLUMNS), rng.standard_normal(COLUMNS)
    outliers[::37], half[:200] = 9, 0
    special = [
        *(np.zeros(COLUMNS), np.full(COLUMNS, 0.7), np.full(COLUMNS, -0.3), outliers, half),
        *(rng.uniform(0.5, 1, COLUMNS), -rng.uniform(0.5, 1, COLUMNS), 1e4 * normal[0], 1e-20 * normal[0]),
        2.0 ** rng.integers(-30, 10, COLUMNS) * rng.choice([-1, 1], COLUMNS),
    ]
    return np.concatenate([0.02 * normal, 0.05 * heavy, np.stack(special)]).astype(np.float32)


def importances() -> dict[str, np.ndarray]:
    """As activations have them; as a text that never uses half of the inputs has them; extreme ones."""
    rng = np.random.default_rng(1)
    activations = rng.standard_normal(COLUMNS) ** 2 * np.exp(rng.standard_normal(COLUMNS))
    halves = np.where(rng.random(COLUMNS) < 0.5, 0.0, 1.0)
    found = {
        "activations": activations,
        "halves": halves,
        "extreme": np.exp(8 * rng.standard_normal(COLUMNS)),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def main() -> None:
    arrays = {"rows": rows(), **importances()}
    for kind in ENCODERS:
        if kind in NUMBERS:
            continue
        arrays[f"{kind.name}/none"] = llama_quantizer.encode(arrays["rows"], kind)
        for name, importance in importances().items():
            encoded = llama_quantizer.encode(arrays["rows"], kind, importance)
            if (encoded != arrays[f"{kind.name}/none"]).any():
                arrays[f"{kind.name}/{name}"] = encoded
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]: names are not its flags'


if __name__ == "__main__":
    main()
