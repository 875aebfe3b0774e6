"""What is seen of every architecture fits together, and is llama.cpp's model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_golden import USES_GELU

from realm_jax import research, runtime
from realm_jax.config import EngineConfig
from realm_jax.loading import load_model
from realm_jax.research import Forward

CASES = ("llama-bias", "llama-moe", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "deepseek2", "qwen2moe")


@pytest.mark.parametrize("case", CASES)
def test_activations(fixtures: Path, case: str):
    expected = np.load(fixtures / "arch" / case / "expected.npz")
    options = EngineConfig(dtype="float32", ctx_size=256)
    runtime.configure(options)
    loaded = load_model(fixtures / "arch" / case / "model.gguf", options)
    model, c = loaded.transformer, loaded.config
    tokens = expected["tokens"][None].astype(np.int32)

    @jax.jit
    def run(params: Any) -> tuple[Forward, list[jax.Array], jax.Array]:
        found = research.forward(model, params, tokens, capture=["*"])
        halves = [
            by_hand(found, i, c.attention_scale, c.attention_softcap, kind.window)
            for i, kind in enumerate(c.layers)
        ]
        return found, halves, research.unembed(model, params, found.layers("resid_post"))

    found, weights, lens = run(loaded.params)
    golden = expected["logits_dequant" if "logits_dequant" in expected else "logits"]
    assert np.abs(found.logits[0] - golden).max() < (5e-3 if case in USES_GELU else 1e-4)
    np.testing.assert_allclose(lens[-1], found.logits, atol=1e-5)
    for i, wanted in enumerate(weights):
        at = found[f"layers.{i}.attention.weights"]
        np.testing.assert_allclose(at.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(at, wanted, atol=1e-5)
        mixed, fed = (f"layers.{i}.{half}{'_post_norm' * c.post_norms}" for half in ("attention", "mlp"))
        before, between, after = (found[f"layers.{i}.resid_{at}"] for at in ("pre", "mid", "post"))
        np.testing.assert_allclose(before + found[mixed], between, atol=1e-4, rtol=1e-5)
        np.testing.assert_allclose(between + found[fed], after, atol=1e-4, rtol=1e-5)
        if i:
            np.testing.assert_array_equal(before, found[f"layers.{i - 1}.resid_post"])
    np.testing.assert_array_equal(found["embedding"], found["layers.0.resid_pre"])


def by_hand(found: Forward, layer: int, scale: float, cap: float | None, window: int | None) -> jax.Array:
    """Softmax of q times k, of what each query sees."""
    q, k = (found[f"layers.{layer}.attention.{x}"] for x in "qk")
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") * scale
    scores = scores if cap is None else cap * jnp.tanh(scores / cap)
    t = jnp.arange(q.shape[1], dtype=jnp.int32)
    distance = t[:, None] - t[None, :]
    visible = (distance >= 0) & (distance < (window or len(t)))
    return jax.nn.softmax(jnp.where(visible[None, None], scores, -jnp.inf), axis=-1)
