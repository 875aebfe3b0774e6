"""What architectures can do beyond the golden models equals llama.cpp's, too."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from variants import GOLDEN, VARIANTS, prompt, write_variant

from realm_jax import LLM
from realm_jax.config import MoEConfig
from realm_jax.layers.moe import route

USES_GELU = ("falcon-40b", "gemma4", "gemma4-experts")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_llama_cpps(fixtures: Path, tmp_path: Path, name: str):
    llm = LLM(write_variant(fixtures, name, tmp_path / "model.gguf"), dtype="float32", ctx_size=256)
    logits = llm.logits(prompt(fixtures, name))[[15, 31, 47]]
    golden = np.load(GOLDEN)[name]
    base = np.load(fixtures / "arch" / VARIANTS[name].base / "expected.npz")["logits"][[15, 31, 47]]
    assert (np.abs(golden - base).max() > 0.05) == VARIANTS[name].is_another, "the variant says nothing"
    assert np.abs(logits - golden).max() < (5e-3 if name in USES_GELU else 1e-4)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups", [None, (4, 2)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_token_goes_to_its_best_experts(scores, groups, has_bias: bool, renormalize: bool):
    moe = MoEConfig(16, 3, 8, scores, has_bias, groups, renormalize, scale=1.5)
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((2, 5, 16), np.float32)
    bias = rng.standard_normal(16, np.float32) if has_bias else None
    chosen, share = map(
        np.asarray, route(jnp.asarray(logits), None if bias is None else jnp.asarray(bias), moe)
    )
    for row, found, weights in zip(
        logits.reshape(-1, 16), chosen.reshape(-1, 3), share.reshape(-1, 3), strict=True
    ):
        each = row.astype(np.float64)
        score = 1 / (1 + np.exp(-each)) if scores == "sigmoid" else np.exp(each) / np.exp(each).sum()
        ranked = score + (0 if bias is None else bias)
        if groups is not None:
            of_groups = [sum(sorted(ranked[4 * g : 4 * g + 4])[-2:]) for g in range(4)]
            for g in np.argsort(of_groups)[:2]:
                ranked[4 * g : 4 * g + 4] = -np.inf
        best = np.argsort(-ranked)[:3]
        wanted = score[best] / (score[best].sum() if renormalize else 1) * 1.5
        assert found.tolist() == best.tolist()
        np.testing.assert_allclose(weights, wanted, rtol=1e-5)
