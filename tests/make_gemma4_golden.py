"""Logits of tiny Gemma 4 models as transformers computes them, from the tensors of `variants`.

Run by hand, in an environment of its own; the project itself never imports torch or transformers:

    python -m venv golden && golden/bin/pip install torch transformers gguf
    golden/bin/python tests/make_gemma4_golden.py path/to/fixtures

Made with torch 2.13.0 and transformers 5.23.0.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from variants import prompt, write_variant

GOLDEN = Path(__file__).parent / "golden" / "gemma4.npz"
GREEDY = 16  # tokens
UNREAD = re.compile(r"model\.layers\.[23]\.self_attn\.(k_proj|v_proj|k_norm)\.weight")
PARTS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
    "ffn_gate_inp.weight": "router.proj.weight",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_gate_up_exps.weight": "experts.gate_up_proj",
    "ffn_down_exps.weight": "experts.down_proj",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
    "layer_output_scale.weight": "layer_scalar",
}
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    "output_norm.weight": "model.norm.weight",
}
EXPERTS: dict[str, Any] = {
    "attention_k_eq_v": True,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 48,
}
INPUTS: dict[str, Any] = {
    "num_key_value_heads": 1,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
}


def build(path: Path, facts: dict[str, Any], wide: dict[int, int]) -> Callable[[list[int]], np.ndarray]:
    """What gives logits of all positions. wide: features of the layers that have others than the rest."""
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Gemma4TextConfig  # pyright: ignore[reportMissingImports]
    from transformers.models.gemma4.modeling_gemma4 import (  # pyright: ignore[reportMissingImports]
        Gemma4ForCausalLM,
    )

    config = Gemma4TextConfig(
        vocab_size=320,
        vocab_size_per_layer_input=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=16,
        global_head_dim=32,
        rms_norm_eps=float(np.float32(1e-5)),
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        final_logit_softcapping=30.0,
        attn_implementation="eager",
        **facts,
    )
    model = Gemma4ForCausalLM(config).eval()
    for layer, features in wide.items():
        mlp = model.model.layers[layer].mlp
        mlp.gate_proj, mlp.up_proj = (torch.nn.Linear(64, features, bias=False) for _ in range(2))
        mlp.down_proj = torch.nn.Linear(features, 64, bias=False)
    state = {name: torch.tensor(data) for name, data in _renamed(path)}
    missing, unknown = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert all(UNREAD.fullmatch(name) for name in unknown), unknown
    model.tie_weights()

    def logits(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].numpy()

    return logits


def _renamed(path: Path) -> list[tuple[str, np.ndarray]]:
    """The tensors by transformers' names, which makes `rope_freqs` itself."""
    found = []
    for each in gguf.GGUFReader(path).tensors:
        layer = re.fullmatch(r"blk\.(\d+)\.(.+)", each.name)
        name = f"model.layers.{layer[1]}.{PARTS[layer[2]]}" if layer else WHOLE.get(each.name)
        if name is not None:
            found.append((name, np.array(each.data)))
    return found


def main() -> None:
    fixtures, golden = Path(sys.argv[1]), {}
    models = {"gemma4": (INPUTS, {2: 160, 3: 160}), "gemma4-experts": (EXPERTS, {})}
    with tempfile.TemporaryDirectory() as folder:
        for name, (facts, wide) in models.items():
            path = write_variant(fixtures, name, Path(folder) / f"{name}.gguf")
            logits, tokens = build(path, facts, wide), prompt(fixtures, name)
            golden[name] = logits(tokens)[[15, 31, 47]]
            for _ in range(GREEDY):
                tokens.append(int(logits(tokens)[-1].argmax()))
            golden[f"{name}-greedy"] = np.array(tokens[-GREEDY:])
    np.savez(GOLDEN, **golden)


if __name__ == "__main__":
    main()
