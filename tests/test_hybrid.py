"""Hybrid models: llama.cpp's logits, and the engine's laws where a sequence's state is one for all tokens."""

import hashlib
import random
from pathlib import Path
from typing import Any

import gguf as gguf_py
import jax
import numpy as np
import pytest
from conftest import count_compilations
from test_batching import bits
from test_engine import GREEDY, mixed_requests, random_prompt
from test_golden import log_softmax
from test_lora_applied import random_adapter
from tiny import write_model
from tiny_hybrid import write_hybrid

from realm_jax import LLM, SamplingParams, gguf, inspection, research
from realm_jax.buckets import Buckets, Pool
from realm_jax.config import EngineConfig
from realm_jax.errors import ModelFileError, RealmError, UnsupportedError
from realm_jax.loading import load_model
from realm_jax.lora import Adapter
from realm_jax.lora.export import write_gguf
from realm_jax.model import Transformer
from realm_jax.parallel import Division
from realm_jax.serving.request import GenerationOutput, Request
from realm_jax.speculation import fitting
from realm_jax.training import Trainer, TrainingConfig

GOLDEN = np.load(Path(__file__).parent / "data" / "hybrid.npz")
TYPES = gguf_py.GGMLQuantizationType
MATRICES = ("attn_qkv", "attn_gate", "ssm_out", "attn_q", "ffn_up", "ffn_down")
QUANTIZED: dict[str, TYPES] = dict.fromkeys(MATRICES, TYPES.Q8_0)
SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "ctx_size": 512}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One delta net, one attention."""
    return write_hybrid(tmp_path_factory.mktemp("hybrid") / "hybrid.gguf")


@pytest.fixture(scope="module")
def exact(hybrid: Path) -> LLM:
    """Slots of 128 tokens and of 512: sequences grow out of the small ones."""
    with pytest.MonkeyPatch.context() as patch:
        pools = tuple(Pool(capacity, 4, (4,), (4,)) for capacity in (128, 512))
        patch.setattr(Buckets, "plan", classmethod(lambda *_: Buckets(pools, 4, (0, 1, 2, 4))))
        return LLM(hybrid, dtype="float32", **SMALL)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same weights in Q8_0, multiplied as they are where there are kernels for that."""
    path = write_hybrid(tmp_path_factory.mktemp("quantized") / "quantized.gguf", kinds=QUANTIZED)
    options: dict[str, Any] = SMALL | {"max_num_batched_tokens": 64}
    return LLM(path, **options)


def test_greedy_tokens_are_llama_cpps(exact: LLM) -> None:
    tokens, greedy = (GOLDEN[f"qwen35_{name}"].tolist() for name in ("tokens", "greedy"))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    assert exact.generate([tokens], params)[0].token_ids == greedy


@pytest.mark.parametrize(
    "architecture", ["qwen35", pytest.param("qwen35moe", marks=pytest.mark.slow), "qwen3next"]
)
def test_logits_are_llama_cpps(tmp_path: Path, architecture: str) -> None:
    path = write_hybrid(tmp_path / "model.gguf", architecture=architecture)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == GOLDEN[f"{architecture}_sha256"], "another random model"
    logits = LLM(path, dtype="float32", **SMALL).logits(GOLDEN[f"{architecture}_tokens"].tolist())
    assert np.abs(logits[3::4] - GOLDEN[f"{architecture}_logits"]).max() < 1e-4


@pytest.mark.parametrize("name", ["exact", "rounded"])
def test_batched_is_alone_and_slots_forget(request: pytest.FixtureRequest, name: str) -> None:
    """Prompts of several tiles in one call, slots used again and again, and users who leave."""
    llm: LLM = request.getfixturevalue(name)
    rng = random.Random(0)
    _, params = mixed_requests(1, 16)
    prompts = [random_prompt(rng, rng.choice([1, 63, 64, 65, 130, 200, 400])) for _ in range(16)]
    alone = [bits(llm.generate([p], q)[0]) for p, q in zip(prompts, params, strict=True)]
    for taken in (0, 3):
        leave_after(llm, random_prompt(rng, 300), taken)
        order = rng.sample(range(16), 16)
        outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order])
        assert [bits(output) for output in outputs] == [alone[i] for i in order]
        assert not any(output.usage.cached_tokens for output in outputs)


def leave_after(llm: LLM, prompt: list[int], steps: int) -> None:
    """A request that ends by its user's wish, before its prompt has been read or while it says more."""
    llm.engine.add_request(Request("leaving", tuple(prompt), GREEDY, seed=0))
    for _ in range(1 + steps):
        llm.engine.step()
    llm.engine.abort("leaving")


def test_nothing_compiles_after_warmup(exact: LLM) -> None:
    assert exact.engine.warmup() == len(exact.engine.buckets.programs())
    prompts = [random_prompt(random.Random(3), length) for length in (5, 64, 100, 100)]
    with count_compilations() as compiled:
        exact.generate(prompts, GREEDY)
    assert not compiled


def test_quantized_weights_say_nearly_the_same(exact: LLM, rounded: LLM) -> None:
    prompts = [random_prompt(random.Random(seed), 100) for seed in range(8)]
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    one, other = (best(llm.generate(prompts, params)) for llm in (exact, rounded))
    both = one.keys() & other.keys()
    assert len(both) > 0.8 * len(one)
    assert np.mean([abs(one[key] - other[key]) for key in both]) < 0.1


def best(outputs: list[GenerationOutput]) -> dict[tuple[int, float], float]:
    """What the first tokens that score most have, by output and token."""
    return {(i, t): p for i, output in enumerate(outputs) for t, p in (output.logprobs or [])[0]["top"]}


def test_a_growing_sequence_says_what_its_whole_text_scores(exact: LLM) -> None:
    """From the prompt's tiles through steps into a larger slot: what one pass over all says."""
    prompt = random_prompt(random.Random(1), 110)
    params = SamplingParams(temperature=1, seed=1, max_tokens=40, ignore_eos=True, logprobs=0)
    *deltas, last = exact.stream(prompt, params)
    output = last.output
    assert output is not None and output.logprobs is not None
    assert "copy from capacity 128 to 512" in exact.engine.programs
    scored = log_softmax(exact.logits([*prompt, *output.token_ids]))[len(prompt) - 1 : -1]
    found = [each["logprob"] for each in output.logprobs]
    expected = np.take_along_axis(scored, np.array(output.token_ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert "".join(delta.text for delta in (*deltas, last)) == output.text


def test_scores_of_a_prompt_are_those_of_its_logits(exact: LLM) -> None:
    ids = random_prompt(random.Random(2), 150)
    scores = log_softmax(exact.logits(ids))[:-1]
    expected = np.take_along_axis(scores, np.array(ids[1:])[:, None], axis=1)[:, 0]
    (score,) = exact.score([ids])
    np.testing.assert_allclose(np.array(score.logprobs[1:], float), expected, rtol=0, atol=1e-4)


def test_an_adapter_named_by_a_request_is_the_folded_one(hybrid: Path, exact: LLM, tmp_path: Path) -> None:
    adapter = random_adapter(exact, 1, 4)
    assert "blk.0.attn_qkv.weight" in adapter.deltas
    dropped = {name: delta for name, delta in adapter.deltas.items() if "conv1d" not in name}
    file = tmp_path / "a.gguf"
    write_gguf(Adapter("a", dropped), exact.model.base, file)
    ids = random_prompt(random.Random(5), 70)
    folded = LLM(hybrid, dtype="float32", fold=[file], **SMALL).logits(ids)
    exact.load_adapter("a", file)
    named = exact.logits(ids, lora="a")
    assert np.abs(named - folded).max() < 1e-3 < np.abs(named - exact.logits(ids)).max()
    exact.unload_adapter("a")


def test_layers_that_only_draft_change_nothing(tmp_path: Path) -> None:
    """Their tensors lie in the file; what another tensor would be is still refused."""
    plain, more = (
        write_hybrid(tmp_path / f"{n}.gguf", layers=4, period=4, drafting_layers=n) for n in (0, 1)
    )
    loaded = [load_model(path, EngineConfig(dtype="float32")).params for path in (plain, more)]
    for one, other in zip(*(jax.tree.leaves(params) for params in loaded), strict=True):
        np.testing.assert_array_equal(one, other)
    with gguf.open(more) as file:
        assert inspection.describe(file)["layers"] == 4


def test_planned_memory_is_what_caches_take(hybrid: Path) -> None:
    with gguf.open(hybrid) as file:
        planned = inspection.describe(file)["memory_bytes"]["float32"]
    model = load_model(hybrid, EngineConfig(dtype="float32"))
    caches = Transformer(model.config).empty_caches(1, 1024, inspection.NUMERICS["float32"])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    assert held == planned["cache_per_1024_tokens"] + planned["state_per_sequence"]
    needed = planned["weights"] + 4 * held // 4  # four slots, and each of 256 tokens
    needed += 3 * planned["state_per_sequence"]
    options: dict[str, Any] = {"dtype": "float32", "ctx_size": 256, "max_num_seqs": 4}
    assert load_model(hybrid, EngineConfig(**options, memory=needed)).spare == 0
    with pytest.raises(RealmError, match="raise --memory"):
        load_model(hybrid, EngineConfig(**options, memory=needed - 1))


def test_what_a_state_does_not_allow_is_refused_in_one_line(
    hybrid: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnsupportedError, match=r"spec_type is 'ngram'.*cannot take back"):
        LLM(hybrid, spec_type="ngram")
    plain = write_model(tmp_path / "plain.gguf", layers=1)
    with pytest.raises(UnsupportedError, match="a draft model is given"):
        LLM(hybrid, draft_model=plain)
    with pytest.raises(UnsupportedError, match=r"hybrid\.gguf has recurrent layers"):
        LLM(plain, draft_model=hybrid)
    model = load_model(hybrid, EngineConfig())
    with pytest.raises(UnsupportedError, match="'tp=2', but qwen35 has recurrent layers"):
        Division(model.config, 2)
    with caplog.at_level("INFO"):
        assert not fitting(EngineConfig(), model.config).prefix_caching
    said = [message for message in caplog.messages if not message.startswith("kernels:")]
    assert said == ["prefixes are not reused: recurrent layers have one state for a whole sequence"]
    with pytest.raises(UnsupportedError, match="nothing is trained"):
        Trainer(model, [], TrainingConfig())
    with pytest.raises(UnsupportedError, match="activations of qwen35, which has recurrent layers"):
        research.names(model.transformer, model.params)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"ssm.group_count": 3}, "time_step_rank is 4, no multiple of group_count 3"),
        ({"ssm.inner_size": 60}, "inner_size is 60"),
        ({"ssm.conv_kernel": 1}, "conv_kernel is 1"),
        ({"ssm.state_size": 1 << 20}, "ssm.state_size is 1048576"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers is 4, all of block_count"),
        ({"attention.recurrent_layers": 1}, "must be an array of 4 flags"),
        ({"ssm.time_step_rank": 8, "ssm.inner_size": 128}, r"blk.0.ssm_a is \[4\], expected \[8\]"),
        ({"full_attention_interval": 2}, "blk.1.attn_q.weight is missing"),
    ],
)
def test_wrong_facts_are_named(tmp_path: Path, metadata: dict[str, int], words: str) -> None:
    path = write_hybrid(tmp_path / "model.gguf", layers=4, period=4, metadata=metadata)
    with pytest.raises((ModelFileError, UnsupportedError), match=words), gguf.open(path) as file:
        inspection.describe(file)
