"""Adapters as files: both forms of one adapter are equal, and what is read is what was written."""

from pathlib import Path

import numpy as np
import pytest

from realm_jax import gguf, lora
from realm_jax.architectures import read_config
from realm_jax.lora import Adapter, Base

CASES = {
    "tiny-llama-mha/adapter1": "llama-mha",
    "tiny-llama-mha/adapter2": "llama-mha",
    "tiny-llama-gqa-tied": "llama-gqa-tied",
    "smollm2": None,
}


def base_of(path: Path) -> Base:
    with gguf.open(path) as file:
        return Base.of(file, read_config(file))


def assert_equal(one: Adapter, other: Adapter) -> None:
    """All arrays are equal, bit for bit, and all scales to float32's rounding."""
    assert one.deltas.keys() == other.deltas.keys()
    for name, delta in one.deltas.items():
        np.testing.assert_array_equal(delta.a, other.deltas[name].a, err_msg=name)
        np.testing.assert_array_equal(delta.b, other.deltas[name].b, err_msg=name)
        assert delta.scale == pytest.approx(other.deltas[name].scale, rel=1e-7), name
    for mine, theirs in ((one.replaced, other.replaced), (one.magnitudes, other.magnitudes)):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_both_forms_of_an_adapter_are_equal(fixtures: Path, default_model: Path, case: str):
    model = CASES[case]
    base = base_of(default_model if model is None else fixtures / "arch" / model / "model.gguf")
    folder = fixtures / "lora" / case
    from_gguf, from_peft = lora.read(folder / "adapter.gguf", base), lora.read(folder, base)
    assert len(from_gguf.deltas) > 3
    assert_equal(from_gguf, from_peft)
