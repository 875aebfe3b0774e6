"""Loading: every problem named at once, values exact, memory bounded."""

import math
import re
import subprocess
import sys
from pathlib import Path

import gguf as gguf_py
import jax
import numpy as np
import pytest
from tiny import write_model

from realm_jax import ModelFileError, gguf, weights
from realm_jax.architectures import parameters, read_config
from realm_jax.config import Numerics
from realm_jax.nodes import Biased, Dense
from realm_jax.quant import dequantize

FLOAT32 = Numerics("float32", "float32", "dense", "xla")


def rewrite(source: Path, target: Path, *, drop: str = "", extra: str = "", reshape: str = "") -> Path:
    """A copy of a model with one tensor missing, one added, or one of another shape."""
    reader = gguf_py.GGUFReader(source)
    writer = gguf_py.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        kind = field.types[0]
        sub_type = field.types[-1] if kind == gguf_py.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type)
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        if tensor.name != drop:
            writer.add_tensor(tensor.name, data[:-1] if tensor.name == reshape else data)
    if extra:
        writer.add_tensor(extra, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def load(path: Path) -> weights.Params:
    with gguf.open(path) as file:
        return weights.load(file, read_config(file), numerics=FLOAT32, context=256)


def test_every_problem_is_named_at_once(tiny_model: Path, tmp_path: Path) -> None:
    broken = rewrite(
        tiny_model,
        tmp_path / "broken.gguf",
        drop="blk.1.ffn_down.weight",
        extra="blk.0.surprise.weight",
        reshape="blk.0.attn_q.weight",
    )
    with pytest.raises(ModelFileError) as error:
        load(broken)
    message = str(error.value)
    assert message.startswith("broken.gguf: ") and "\n" not in message
    assert "blk.1.ffn_down.weight is missing" in message
    assert "blk.0.surprise.weight is unknown" in message
    assert "blk.0.attn_q.weight is [63, 64], expected [64, 64]" in message


def test_params_hold_the_files_values(fixtures: Path) -> None:
    path = fixtures / "arch" / "llama-bias" / "model.gguf"
    params = load(path)
    with gguf.open(path) as file:

        def values(name: str) -> np.ndarray:
            return dequantize(file.data(name), file.tensors[name].ggml_type, file.tensors[name].shape)

        qkv = params["layer_0"]["attention"]["qkv"]["kernel"]
        assert isinstance(qkv, Biased) and isinstance(qkv.kernel, Dense)
        names = [f"blk.0.attn_{part}" for part in "qkv"]
        np.testing.assert_array_equal(
            qkv.kernel.weight, np.concatenate([values(f"{n}.weight") for n in names])
        )
        np.testing.assert_array_equal(qkv.bias, np.concatenate([values(f"{n}.bias") for n in names]))
        np.testing.assert_array_equal(params["norm"]["scale"].weight, values("output_norm.weight"))


@pytest.mark.parametrize("case", ["gpt-oss", "stablelm"])
def test_every_bias_is_expanded_once(fixtures: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Of a tensor of all experts' biases each expert reads its own; norms have biases, too."""
    expanded = []

    def count(data: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
        expanded.append(math.prod(shape))
        return dequantize(data, kind, shape)

    monkeypatch.setattr(weights, "dequantize", count)
    path = fixtures / "arch" / case / "model.gguf"
    params = load(path)
    with gguf.open(path) as file:
        infos = file.tensors.values()
        vectors = [i for i in infos if len(i.shape) == 1 or i.name.endswith(".bias")]
        assert sum(expanded) == sum(math.prod(info.shape) for info in vectors)
        biases = {
            i.name: dequantize(file.data(i.name), i.ggml_type, i.shape) for i in infos if "bias" in i.name
        }
    if case == "stablelm":
        np.testing.assert_array_equal(params["norm"]["scale"].bias, biases["output_norm.bias"])
        return
    both = np.concatenate([biases[f"blk.0.ffn_{part}_exps.bias"] for part in ("gate", "up")], axis=1)
    np.testing.assert_array_equal([e.bias for e in params["layer_0"]["mlp"]["experts"].gate_up], both)


def test_a_tied_head_is_held_once(fixtures: Path) -> None:
    params = load(fixtures / "arch" / "llama-gqa-tied" / "model.gguf")
    assert params["head"] is params["embedding"]
    distinct = {id(leaf): leaf.nbytes for leaf in jax.tree.leaves(params)}
    assert weights.resident_bytes(params) == sum(distinct.values())


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_parameters_are_the_files_tensors(tmp_path: Path, architecture: str) -> None:
    path = write_model(tmp_path / "m.gguf", architecture=architecture, qk_norm=architecture == "qwen3")
    with gguf.open(path) as file:
        named = [part.name + ".weight" for p in parameters(read_config(file)) for part in p.parts]
        assert sorted(named) == sorted(file.tensors)


PEAK = """
import resource, sys
from pathlib import Path
import jax, jax.numpy as jnp
from realm_jax import weights
from realm_jax.config import EngineConfig
from realm_jax.loading import load_model
jnp.zeros(8).block_until_ready()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
idle = peak()
model = load_model(Path(sys.argv[1]), EngineConfig(dtype=sys.argv[2]))
print(peak() - idle, weights.resident_bytes(model.params), model.seconds)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_at_load(default_model: Path, dtype: str) -> None:
    """Above an idle process, loading needs little more than what stays: the tokenizer, some buffers."""
    command = [sys.executable, "-c", PEAK, str(default_model), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    above, resident, _ = map(float, re.findall(r"[\d.]+", done.stdout))
    assert resident > 8e7
    assert above <= 1.3 * resident + 60e6
