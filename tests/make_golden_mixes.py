"""Writes golden_mixes.npz: which type llama.cpp gives each tensor (needs llama-cpp-python)."""

import tempfile
from pathlib import Path

import gguf as gguf_py
import llama_quantizer
import numpy as np

from realm_jax import gguf
from realm_jax.quantization.file_types import FILE_TYPES

GOLDEN = Path(__file__).with_name("golden_mixes.npz")
WIDTH = 256
LAYERS = {"llama": 16, "wide": 17, "tied": 16, "experts": 16, "four": 16, "70b": 80, "falcon": 33}
EXPERTS = {"experts": 8, "four": 4}


def architecture(case: str) -> str:
    return "falcon" if case == "falcon" else "llama"


def metadata(case: str) -> dict[str, int]:
    """Without the architecture's name before each key."""
    heads = {"wide": (8, 2), "70b": (8, 1), "falcon": (4, 1)}.get(case, (4, 2))
    keys = {
        "block_count": LAYERS[case],
        "attention.head_count": heads[0],
        "attention.head_count_kv": heads[1],
    }
    if case in EXPERTS:
        keys |= {"expert_count": EXPERTS[case], "expert_used_count": 2}
    return keys


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """All tensors, in an order that is not that of the layers."""
    found = {"token_embd": (320, WIDTH), "output_norm": (WIDTH,)}
    if case != "tied":
        found["output"] = (320, WIDTH)
    for layer in reversed(range(LAYERS[case])):
        found |= {f"blk.{layer}.{name}": shape for name, shape in _layer(case).items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


def _layer(case: str) -> dict[str, tuple[int, ...]]:
    square, kv = (WIDTH, WIDTH), (64, WIDTH)
    found = {"attn_norm": (WIDTH,), "attn_output": square}
    if case == "falcon":
        return found | {"attn_qkv": (WIDTH + 128, WIDTH), "ffn_up": square, "ffn_down": square}
    found |= {"attn_q": square, "attn_k": kv, "attn_v": kv, "ffn_norm": (WIDTH,)}
    if case not in EXPERTS:
        return found | dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), square)
    count = EXPERTS[case]
    stacked = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), (count, 32, WIDTH))
    return found | {"ffn_gate_inp": (count, WIDTH)} | stacked


def write(path: Path, case: str) -> None:
    """A model of zeros."""
    out = gguf_py.GGUFWriter(path, architecture(case))
    for key, value in metadata(case).items():
        out.add_uint32(f"{architecture(case)}.{key}", value)
    for key in ("context_length", "embedding_length", "feed_forward_length"):
        out.add_uint32(f"{architecture(case)}.{key}", WIDTH)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_layer_norm_eps(1e-5)
    for name, shape in shapes(case).items():
        out.add_tensor(name, np.zeros(shape, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def main() -> None:
    arrays: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.gguf", Path(folder) / "out.gguf"
        for case in LAYERS:
            write(source, case)
            ones = {n: np.ones(int(np.prod(s[:-2])) * s[-1], np.float32) for n, s in shapes(case).items()}
            for kind in FILE_TYPES.values():
                for name, means in (("plain", None), ("importance", ones)):
                    if (kind.name, name) == ("Q2_K_S", "plain"):
                        continue
                    llama_quantizer.quantize(source, target, kind, means)
                    with gguf.open(target) as file:
                        types = [file.tensors[tensor].ggml_type for tensor in shapes(case)]
                    arrays[f"{case}/{kind.name}/{name}"] = np.array(types, np.uint8)
    np.savez_compressed(GOLDEN, **arrays)  # pyright: ignore[reportArgumentType]: names are not its flags'


if __name__ == "__main__":
    main()
