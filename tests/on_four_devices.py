"""Laws of a mesh, run by test_mesh.py in a process of its own with four virtual CPU devices."""

import functools
import json
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from command_line import realm
from conftest import count_compilations
from jax.sharding import PartitionSpec as P
from tiny import write_model

from realm_jax import LLM, RequestError, SamplingParams, UnsupportedError
from realm_jax import gguf as realm_gguf
from realm_jax.config import EngineConfig
from realm_jax.convert.orbax import Checkpoint
from realm_jax.ggml import BLOCK_SIZES, GGMLType
from realm_jax.loading import load_model
from realm_jax.parallel.model import mesh_of, on_each
from realm_jax.parallel.nodes import AXIS, ONE_STEP, Split, device_sum
from realm_jax.quant import FORMATS, dequantize
from realm_jax.serving.request import GenerationOutput

FOUR = "tp=4"
SMALL: dict[str, Any] = {
    "ctx_size": 64,
    "dtype": "float32",
    "deterministic": True,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
}
PROMPT = [1, 7, 9, 7, *range(20, 60)]
PROMPTS = ["hello world this is", PROMPT[:9], PROMPT, PROMPT[:4]]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=0, max_tokens=12, presence_penalty=0.5),
    SamplingParams(temperature=1, max_tokens=12, seed=3, top_p=0.9),
    SamplingParams(temperature=0, max_tokens=24, logit_bias={7: 100.0}),  # easy to guess
]
Q8_0, Q4_K = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_K


@pytest.fixture(scope="module")
def model(fixtures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small model by name: one of the golden data, or one made here."""
    folder = tmp_path_factory.mktemp("models")

    @functools.cache
    def path(name: str) -> Path:
        match name:
            case "odd-heads":  # as the default model's: nine heads in three groups
                return write_model(folder / "odd.gguf", width=144, heads=9, kv_heads=3, ffn=384)
            case "quantized":  # [q|k|v] of two types, so of two nodes
                kinds: Any = dict.fromkeys(("attn_q", "attn_output", "ffn_down", "ffn_up", "ffn_gate"), Q8_0)
                return write_model(folder / "quantized.gguf", width=128, ffn=256, kinds=kinds)
            case "k-quants":
                return write_model(folder / "k.gguf", width=256, ffn=512, kinds={"ffn_down": Q4_K})
        return fixtures / "arch" / name / "model.gguf"

    return path


def tokens(outputs: list[GenerationOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def resident(llm: LLM) -> dict[Any, int]:
    """Bytes of the params on each device."""
    arrays = {id(x): x for x in jax.tree.leaves(llm.model.params)}.values()
    found = dict.fromkeys(jax.devices(), 0)
    for shard in (shard for x in arrays for shard in x.addressable_shards):
        found[shard.device] += shard.data.nbytes
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("odd-heads", {}),
        ("llama-bias", {"mesh": "tp=3"}),  # two kv heads and 320 tokens on three devices
        ("qwen3", {"kernels": "reference"}),
        ("gemma2", {"kv_dtype": "int8"}),
        ("llama-moe", {}),
        ("phi3", {}),
        ("quantized", {"weights": "quantized", "kernels": "xla"}),
        ("quantized", {"kernels": "pallas"}),
        ("llama-moe", {"kernels": "pallas"}),
    ],
)
def test_logits_are_those_of_one_device_in_a_quarter_of_its_memory(
    model: Any, name: str, options: dict[str, Any]
):
    """And so every greedy token."""
    given: dict[str, Any] = {"mesh": FOUR} | SMALL | options
    divided = LLM(model(name), **given)
    given["mesh"] = None
    alone = LLM(model(name), **given)
    expected, found = alone.logits(PROMPT), divided.logits(PROMPT)
    np.testing.assert_allclose(found, expected, atol=0.02 if "kv_dtype" in options else 1e-4)
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).all()
    is_exact = name != "llama-bias" and options.get("kernels") != "pallas"  # whose words hold 256 inputs
    share = 0.3 if is_exact else 0.5
    assert max(resident(divided).values()) <= share * max(resident(alone).values())


def test_a_batch_of_adapters_and_guesses_compiles_nothing_after_warm_up(model: Any, fixtures: Path):
    """The model has two key-value heads: each stands on two devices."""
    adapters = dict.fromkeys(("one", "two"), fixtures / "lora" / "tiny-llama-gqa-tied" / "adapter.gguf")
    chosen = [[("one", -30.0)], [("one", 1.0), ("two", -30.0)], None, "two"]
    options: dict[str, Any] = {"lora": adapters, "max_lora_rank": 32, **SMALL}
    alone = LLM(model("llama-gqa-tied"), **options)
    expected = alone.generate(PROMPTS, PARAMS, lora=chosen)
    divided = LLM(model("llama-gqa-tied"), mesh=FOUR, spec_type="ngram", **options)
    divided.engine.warmup()
    with count_compilations() as compiled:
        found = divided.generate(PROMPTS, PARAMS, lora=chosen)
        plain = divided.generate(PROMPTS, PARAMS)
    assert not compiled
    assert tokens(found) == tokens(expected)
    assert [a.token_ids != b.token_ids for a, b in zip(found, plain, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    assert divided.engine.drafts is not None and divided.engine.drafts.accepted > 0
    (state,) = divided.engine._runner._states.values()
    for x in jax.tree.leaves(state.caches):
        assert x.addressable_shards[0].data.shape[1] * 4 == x.shape[1] == 4


@pytest.mark.parametrize("rows", [1, 3, 700])  # 700: past what is sent in one step
def test_a_sum_over_devices_is_in_their_order_whatever_the_batch(rows: int):
    assert 3 * 111 < ONE_STEP < 700 * 111
    x = np.random.default_rng(0).standard_normal((4, 700, 111), np.float32)
    devices = tuple(device.id for device in jax.devices())
    mine = jax.device_put(x[:, :rows], jax.NamedSharding(mesh_of(devices), P(AXIS)))
    (found,) = jax.jit(lambda x: on_each(devices, lambda x: [device_sum(x[0])], (Split(x),), [P()]))(mine)
    expected = ((x[0] + x[1]) + x[2]) + x[3]
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected[:rows])


@pytest.mark.parametrize("kind", list(FORMATS))
def test_zero_bytes_are_zeros_in_every_type(kind: GGMLType):
    """So heads that only fill up a device change nothing."""
    block = BLOCK_SIZES[kind]
    assert not dequantize(np.zeros(block.nbytes, np.uint8), kind, (1, block.elements)).any()


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("llama-mha", {"mesh": "tp=8"}, RequestError, "JAX sees 4 cpu devices"),
        ("llama-mha", {"mesh": "4"}, RequestError, "it must be tp=N"),
        ("llama-mha", {"kernels": "native", "dtype": "bfloat16"}, UnsupportedError, "kernels='native'"),
        ("llama-mha", {"memory": 1 << 30}, UnsupportedError, "--memory counts one device"),
        ("gemma2", {"mesh": "tp=3"}, UnsupportedError, "64 feed-forward features are no multiple of 3"),
        ("k-quants", {"weights": "quantized", "kernels": "xla"}, UnsupportedError, "blocks of 256 inputs"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    model: Any, name: str, options: dict[str, Any], error: type[Exception], words: str
):
    with pytest.raises(error, match=words):
        given: dict[str, Any] = {"mesh": FOUR} | SMALL | options
        LLM(model(name), **given)


def test_doctor_shows_the_mesh():
    facts = json.loads(realm("doctor", "--mesh", FOUR, "--json").out)
    assert facts["mesh"] == FOUR and len(facts["mesh_devices"]) == 4
    assert (facts["kernels"], facts["weights"]) == ("xla", "dense") and "one device" in facts[
        "kernels_because"
    ]


def test_training_is_refused(model: Any):
    training = pytest.importorskip("realm_jax.training")
    divided = load_model(model("llama-mha"), EngineConfig(mesh=FOUR, ctx_size=64))
    with pytest.raises(UnsupportedError, match="without a mesh"):
        training.Trainer(divided, [], training.TrainingConfig(rank=2))


def test_a_checkpoint_is_divided_as_the_file_is(tmp_path: Path):
    kinds: Any = dict.fromkeys(("attn_q", "ffn_down"), Q8_0)
    path = write_model(tmp_path / "m.gguf", width=128, ffn=256, kinds=kinds)
    with realm_gguf.open(path) as file:
        Checkpoint(file).write(tmp_path / "m")
    config = EngineConfig(ctx_size=64, mesh=FOUR, dtype="float32")
    found, expected = (load_model(each, config).params for each in (tmp_path / "m", path))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.sharding == other.sharding and np.array_equal(one, other)
