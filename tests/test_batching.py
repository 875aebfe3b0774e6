"""Laws of many at once: the same bits in any company, prefixes computed once, ends that come from outside."""

import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import count_compilations
from test_engine import GREEDY, mixed_requests, random_prompt, said
from tiny import VOCAB, write_model

from realm_jax import LLM, CapacityError, RequestError, SamplingParams, gguf
from realm_jax.buckets import Pool
from realm_jax.config import TILE
from realm_jax.serving.request import FinishReason, GenerationOutput, Request, TextDelta
from realm_jax.slot_copies import copy_up, copy_within

rng = random.Random(0)


def bits(output: GenerationOutput) -> bytes:
    """Tokens, and every log-probability to the last bit."""
    parts = [np.asarray(output.token_ids, np.int32).tobytes()]
    for each in (*(output.logprobs or ()), *(output.prompt_logprobs or ())):
        if each is not None:
            parts.append(np.float32(each["logprob"]).tobytes() + repr(each["top"]).encode())
    return b"".join(parts) + f"{output.text} {output.finish_reason}".encode()


def requests_with_headers(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Mixed requests; half of them begin alike, some ask for their prompt's log-probabilities."""
    prompts, params = mixed_requests(11, count)
    headers = [random_prompt(rng, length) for length in (TILE, 3 * TILE + 10, 300)]
    for i in range(0, count, 2):
        prompts[i] = [*rng.choice(headers), *prompts[i][: rng.randint(1, 80)]]
        if i % 6 == 0:
            params[i] = replace(params[i], prompt_logprobs=i % 4)
    return prompts, params


@pytest.fixture(scope="module")
def normed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with norms of queries and keys, all heads of which share one of keys."""
    path = tmp_path_factory.mktemp("normed") / "model.gguf"
    return write_model(path, architecture="qwen3", qk_norm=True, kv_heads=1)


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "slots"),
    [("float32", "auto", (8, 16)), ("bfloat16", "auto", (16,)), ("auto", "int8", (16,))],
)
def test_64_requests_in_any_order_give_the_same_bytes(
    normed: Path, dtype: str, kv_dtype: str, slots: tuple[int, ...]
) -> None:
    """Alone without prefix reuse; then shuffled, with it, on few slots and on many."""
    options: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "max_num_batched_tokens": 256}
    prompts, params = requests_with_headers(64)
    lonely = LLM(normed, max_num_seqs=slots[0], prefix_caching=False, **options)  # shares their programs
    alone = [bits(lonely.generate([p], q)[0]) for p, q in zip(prompts, params, strict=True)]
    for llm in (LLM(normed, max_num_seqs=each, **options) for each in slots):
        order = rng.sample(range(64), 64)
        outputs = llm.generate([prompts[i] for i in order], [params[i] for i in order])
        assert [bits(output) for output in outputs] == [alone[i] for i in order]
        assert sum(output.usage.cached_tokens for output in outputs) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_default_model_batched_is_alone(default_model: Path, dtype: str) -> None:
    llm = LLM(default_model, dtype=dtype, ctx_size=512, max_num_seqs=16)
    subjects = ("France", "a fox", "prime numbers", "the sea", "bread", "chess", "rain", "a very long road")
    prompts = [f"Tell me about {subject}." for subject in subjects]
    params = [replace(p, max_tokens=8) for p in mixed_requests(3, count=len(prompts))[1]]
    together = llm.generate(prompts, params)
    alone = [llm.generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    assert [said(o) for o in together] == [said(o) for o in alone]


def test_chunked_prefill_is_one_forward_pass(tiny_model: Path) -> None:
    """Logits over several chunks equal those of every prefix's own chunk."""
    llm = LLM(tiny_model, dtype="float32")
    prompt = random_prompt(random.Random(0), 700)
    whole = llm.logits(prompt)
    for length in (1, 32, 33, 256, 257, 513):
        np.testing.assert_array_equal(llm.logits(prompt[:length])[-1], whole[length - 1])


def test_deterministic_runs_one_shape_and_says_the_same(normed: Path) -> None:
    prompts, params = mixed_requests(2, 12)
    fixed, plain = (
        LLM(normed, max_num_seqs=16, max_num_batched_tokens=256, deterministic=each) for each in (True, False)
    )
    together = fixed.generate(prompts, params)
    assert [said(o) for o in together] == [said(o) for o in plain.generate(prompts, params)]
    assert sum("prefill" in name or "decode" in name for name in fixed.engine.programs) == 2
    assert len(plain.engine.programs) > 2


@pytest.mark.unoptimized
def test_a_header_is_computed_once(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=4)
    header = random_prompt(rng, 5 * TILE + 7)
    prompts = [[*header, *random_prompt(rng, 20)] for _ in range(12)]
    outputs = llm.generate(prompts, GREEDY)
    assert [o.usage.cached_tokens for o in outputs[4:]] == [5 * TILE] * 8
    again = llm.generate(header[: 2 * TILE], GREEDY)[0]
    assert again.usage.cached_tokens == TILE  # the last token is always computed
    other = LLM(tiny_model, max_num_seqs=4, prefix_caching=False)
    assert [bits(o) for o in other.generate(prompts, GREEDY)] == [bits(o) for o in outputs]


def run(llm: LLM, requests: list[Request]) -> dict[str, GenerationOutput]:
    for request in requests:
        llm.engine.add_request(request)
    outputs = {}
    while llm.engine.has_work:
        outputs |= {d.request_id: d.output for d in llm.engine.step() if d.output is not None}
    return outputs


@pytest.mark.unoptimized
def test_prefixes_are_shared_within_a_tenant_only(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=4)
    prompt = tuple(random_prompt(rng, 150))
    for tenant, expected in (("a", 0), ("b", 0), ("a", 128)):
        request = Request("r", prompt, GREEDY, seed=1, tenant=tenant)
        assert run(llm, [request])["r"].usage.cached_tokens == expected


@pytest.mark.unoptimized
def test_prompts_that_come_one_at_a_time_each_find_their_prefix_again(tiny_model: Path) -> None:
    """They may all take the first slot; what stands there is copied aside and, when it is wanted, back."""
    llm, plain = (LLM(tiny_model, max_num_seqs=4, prefix_caching=each) for each in (True, False))
    prompts = [random_prompt(rng, length) for length in (70, 130, 200)]
    for more in ([], [5, 6, 7]):
        outputs = [llm.generate([[*prompt, *more]], GREEDY)[0] for prompt in prompts]
        alone = [plain.generate([[*prompt, *more]], GREEDY)[0] for prompt in prompts]
        expected = [len(prompt) // TILE * TILE if more else 0 for prompt in prompts]
        assert [output.usage.cached_tokens for output in outputs] == expected
        assert [bits(output) for output in outputs] == [bits(output) for output in alone]


@pytest.mark.parametrize(
    ("kernels", "kv_dtype"), [("auto", "bfloat16"), ("auto", "int8"), ("xla", "bfloat16")]
)
def test_a_copy_gives_a_slot_the_first_tiles_of_another(
    tiny_model: Path, kernels: Any, kv_dtype: Any
) -> None:
    """Whatever the capacity and however many tiles; no third slot changes."""
    strategy = LLM(tiny_model, kv_dtype=kv_dtype, kernels=kernels).engine._runner._strategy
    draw = np.random.default_rng(0)

    def filled(tiles: int) -> Any:
        empty = strategy.empty_state(Pool(tiles * TILE, 3, (3,), (1,)))
        return jax.tree.map(lambda x: jnp.asarray(draw.integers(0, 100, x.shape).astype(x.dtype)), empty)

    def kept(state: Any) -> list[np.ndarray]:
        return [np.array(x) for x in (*jax.tree.leaves(state.caches), state.history[:, None])]

    for most, larger in ((9, 9), (2, 2), (6, 11)):
        for tiles in {1, most // 2, most}:
            source = filled(most)
            target = source if larger == most else filled(larger)
            was, beside = kept(source), kept(target)  # the target is donated
            what = np.int32(2), np.int32(0), np.int32(tiles)
            now = copy_within(target, *what) if target is source else copy_up(source, target, *what)
            for x, other, copied in zip(was, beside, kept(now), strict=True):
                part = tiles * x.shape[2] // most
                np.testing.assert_array_equal(copied[0, :, :part], x[2, :, :part])
                np.testing.assert_array_equal(copied[1:], other[1:])


@pytest.mark.unoptimized
def test_smaller_priorities_come_first(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=1)
    ranks = [3, 1, 2, 1, 0]
    requests = [Request(f"{i}", (5, 6, i + 3), GREEDY, seed=0, priority=p) for i, p in enumerate(ranks)]
    assert list(run(llm, requests)) == ["4", "1", "3", "2", "0"]


@pytest.mark.unoptimized
def test_a_full_queue_refuses_by_name_and_harms_nobody(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=2, max_queue=3)
    requests = [Request(f"{i}", (5, 6), GREEDY, seed=0) for i in range(6)]
    for request in requests[:5]:
        llm.engine.add_request(request)
    with pytest.raises(CapacityError, match=r"the queue is full: 5 sequences wait and max_queue is 3"):
        llm.engine.add_request(requests[5])
    assert set(run(llm, [])) == {"0", "1", "2", "3", "4"}
    assert set(run(llm, [requests[5]])) == {"5"}


@pytest.mark.unoptimized
def test_a_timeout_ends_a_request_with_what_it_has(tiny_model: Path) -> None:
    llm = LLM(tiny_model, max_num_seqs=1)
    endless = replace(GREEDY, max_tokens=None)
    expected = llm.generate([[7, 8]], replace(GREEDY, max_tokens=40))[0]
    running = Request("running", (7, 8), endless, seed=0, timeout=0.4)
    waiting = Request("waiting", (7, 8), endless, seed=0, timeout=0.1)
    outputs = run(llm, [running, waiting])
    assert {o.finish_reason for o in outputs.values()} == {FinishReason.TIMEOUT}
    assert list(outputs) == ["waiting", "running"] and not outputs["waiting"].token_ids
    count = min(len(outputs["running"].token_ids), 40)
    assert count and outputs["running"].token_ids[:count] == expected.token_ids[:count]
    assert said(llm.generate([[7, 8]], replace(GREEDY, max_tokens=40))[0]) == said(expected)


def test_nan_stays_in_its_sequence(tmp_path: Path) -> None:
    """A sequence whose numbers are NaN leaves nothing behind in its slot."""
    path = write_model(tmp_path / "nan.gguf")
    data = bytearray(path.read_bytes())
    with gguf.open(path) as file:
        info = file.tensors["token_embd.weight"]
        row = bytes(file.data(info.name)[-info.nbytes // VOCAB :])
    at = data.index(row)
    data[at : at + len(row)] = np.full(len(row) // 4, np.nan, np.float32).tobytes()
    path.write_bytes(data)
    for dtype in ("float32", "bfloat16"):
        llm = LLM(path, dtype=dtype, max_num_seqs=1)
        clean = said(llm.generate([[5, 6, 7]], GREEDY)[0])
        llm.generate([[VOCAB - 1] * 40], GREEDY)
        assert said(llm.generate([[5, 6, 7]], GREEDY)[0]) == clean


def test_prompt_logprobs_are_those_of_the_logits(normed: Path) -> None:
    llm = LLM(normed, dtype="float32", max_num_seqs=8, max_num_batched_tokens=256)
    for length in (2, 64, 65, 130, 600):
        prompt = random_prompt(rng, length)
        for most in (0, 3):
            params = replace(GREEDY, prompt_logprobs=most)
            found = llm.generate([prompt], params)[0].prompt_logprobs
            assert found is not None and found[0] is None and len(found) == length
            logits = llm.logits(prompt)[:-1].astype(np.float64)
            logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            logprobs -= logits.max(-1, keepdims=True)
            for i, each in enumerate(found[1:]):
                assert each is not None and each["token_id"] == prompt[i + 1]
                assert each["logprob"] == pytest.approx(logprobs[i, prompt[i + 1]], abs=2e-5)
                assert each["is_greedy"] == (prompt[i + 1] == logprobs[i].argmax())
                best = np.argsort(-logprobs[i], kind="stable")[:most]
                assert [token for token, _ in each["top"]] == best.tolist()
                np.testing.assert_allclose([p for _, p in each["top"]], logprobs[i, best], atol=2e-5)


@pytest.mark.unoptimized
def test_no_tokens_may_be_asked_for(tiny_model: Path) -> None:
    llm = LLM(tiny_model, ctx_size=1000)
    prompt = random_prompt(rng, 1000)
    output = llm.generate([prompt], SamplingParams(max_tokens=0, prompt_logprobs=0))[0]
    assert output.token_ids == [] and output.text == "" and output.finish_reason is FinishReason.LENGTH
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 1000
    with pytest.raises(RequestError, match="prompt is 1,001 tokens"):
        llm.generate([[*prompt, 5]], SamplingParams(max_tokens=0))


@pytest.mark.slow
@pytest.mark.unoptimized
def test_a_soak_of_mixed_requests_leaks_nothing(tiny_model: Path) -> None:
    """2,000 requests, random aborts: each ends once, nothing compiles, no slot and no memory is kept."""
    import psutil

    llm = LLM(tiny_model, max_num_seqs=32, ctx_size=1024, max_num_batched_tokens=256)
    llm.engine.warmup()
    prompts, params = requests_with_headers(200)
    waiting = [
        Request(
            f"{i}",
            tuple(prompts[i % 200]),
            replace(params[i % 200], n=rng.choice([1, 1, 1, 2])),
            seed=i,
            priority=rng.choice([0, 0, 1]),
            tenant=rng.choice(["a", "b"]),
            timeout=rng.choice([None, None, None, 0.5]),
        )
        for i in range(2000)
    ]
    ends: dict[tuple[str, int], int] = {}

    def note(deltas: list[TextDelta]) -> None:
        for delta in deltas:
            if delta.output is not None:
                key = (delta.request_id, delta.sample_index)
                ends[key] = ends.get(key, 0) + 1

    process, used = psutil.Process(), []
    expected = {(r.id, sample) for r in waiting for sample in range(r.params.n)}
    running: list[str] = []
    with count_compilations() as compiled:
        while waiting or llm.engine.has_work:
            while waiting and llm.engine.scheduler.num_waiting < 30:
                request = replace(waiting.pop(), arrival=time.perf_counter())
                llm.engine.add_request(request)
                running.append(request.id)
                if len(waiting) % 250 == 0:
                    used.append(process.memory_info().rss)
            note(llm.engine.step())
            if rng.random() < 0.03 and running:
                note(llm.engine.abort(running.pop(rng.randrange(len(running)))))
    assert not compiled
    assert ends == dict.fromkeys(expected, 1)
    assert not list(llm.engine.scheduler.slots.taken())
    assert not llm.engine._transcripts and not llm.engine._in_flight
    assert used[-1] - used[2] < 30e6, used
    assert max(max(p) for p in prompts) < VOCAB
