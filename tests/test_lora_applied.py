"""Adapters that requests name: golden logits, rows that know nothing of each other, and coming and going."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import gguf as gguf_py
import numpy as np
import pytest
from command_line import realm
from conftest import count_compilations
from tiny import VOCAB, write_model

from realm_jax import LLM, SamplingParams
from realm_jax.banks import bank_bytes
from realm_jax.cache import cached_bytes
from realm_jax.errors import CapacityError, ModelFileError, RequestError, UnsupportedError
from realm_jax.kernels import native
from realm_jax.lora import Adapter, LowRank
from realm_jax.lora.export import write_gguf
from realm_jax.serving import registry
from realm_jax.serving.request import GenerationOutput, Request
from realm_jax.weights import resident_bytes

GREEDY = SamplingParams(temperature=0, max_tokens=48, logprobs=0, ignore_eos=True)
NUMERICS = [{"dtype": "float32"}]
NUMERICS += [] if native.problem() else [{"kernels": "native"}]
TYPES = gguf_py.GGMLQuantizationType


def random_adapter(llm: LLM, seed: int, rank: int, gain: float = 0.2) -> Adapter:
    """Changes of most of the layers' matrices, large enough to be seen in the text."""
    rng = np.random.default_rng(seed)
    deltas = {
        name: LowRank(
            rng.standard_normal((rank, shape[1]), np.float32),
            rng.standard_normal((shape[0], rank), np.float32),
            gain / rank,
        )
        for name, shape in llm.model.base.shapes.items()
        if name.startswith("blk") and len(shape) == 2 and rng.random() < 0.8
    }
    return Adapter(f"adapter-{seed}", deltas)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that compiles quickly: there are many programs."""
    return write_model(tmp_path_factory.mktemp("small") / "small.gguf", layers=1)


def prompts(count: int, longest: int = 150) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(3, VOCAB, rng.integers(3, longest)).tolist() for _ in range(count)]


def said(output: GenerationOutput) -> tuple[list[int], list[float]]:
    assert output.logprobs is not None
    return output.token_ids, [each["logprob"] for each in output.logprobs]


@pytest.mark.parametrize("form", ["adapter.gguf", ""])
def test_golden_logits(fixtures: Path, form: str):
    case = fixtures / "lora" / "tiny-llama-mha"
    expected = np.load(case / "expected.npz")
    files = {"a": case / "adapter1" / form, "b": case / "adapter2" / form}
    llm = LLM(fixtures / "arch" / "llama-mha" / "model.gguf", dtype="float32", lora=files)
    ids = expected["tokens"].tolist()
    named = {
        "base": None,
        "scale_1.0": "a",
        "scale_0.5": [("a", 0.5)],
        "both_1.0_1.0": [("a", 1.0), ("b", 1.0)],
        "both_0.5_2.0": [("b", 2.0), ("a", 0.5)],
    }
    for key, adapters in named.items():
        assert np.abs(llm.logits(ids, lora=adapters) - expected[f"logits_{key}"]).max() < 1e-4, key


@pytest.mark.slow
def test_golden_logits_of_the_default_model(fixtures: Path, default_model: Path):
    expected = np.load(fixtures / "lora" / "smollm2" / "expected.npz")
    llm = LLM(default_model, dtype="float32", lora={"a": fixtures / "lora" / "smollm2"}, ctx_size=256)
    logits = llm.logits(expected["tokens"].tolist(), lora="a")
    picked = np.take_along_axis(logits, expected["dequant_top_ids_scale_1.0"].astype(np.int64), axis=1)
    for found, key in ((logits[-1], "last_logits"), (picked, "top_logits")):
        golden = expected[f"dequant_{key}_scale_1.0"].astype(np.float32)  # kept in float16
        assert (np.abs(found - golden) < np.abs(golden) * 2.0**-11 + 1e-3).all()


@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.Q8_0, TYPES.Q4_K])
def test_applied_is_folded_on_any_type(tmp_path: Path, kind: gguf_py.GGMLQuantizationType):
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    path = write_model(tmp_path / "m.gguf", layers=1, width=256, ffn=256, kinds=dict.fromkeys(names, kind))
    llm = LLM(path, dtype="float32", ctx_size=128)
    adapter = random_adapter(llm, 1, rank=5)
    write_gguf(adapter, llm.model.base, tmp_path / "a.gguf")
    llm.load_adapter("a", tmp_path / "a.gguf")
    folded = LLM(path, dtype="float32", ctx_size=128, fold=[(tmp_path / "a.gguf", -0.5)])
    ids = prompts(1)[0][:70]
    wanted = folded.logits(ids)
    assert np.abs(llm.logits(ids, lora=[("a", -0.5)]) - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(llm.logits(ids) - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("numerics", NUMERICS)
def test_a_row_is_the_same_beside_any_adapters(small_model: Path, numerics: dict[str, Any]):
    """16 requests over 5 adapters, mixtures of them, and none: together, shuffled, and alone."""
    llm = LLM(small_model, ctx_size=256, max_num_seqs=4, max_num_batched_tokens=256, **numerics)
    for i, rank in enumerate((3, 8, 16, 5, 12)):
        llm.engine.load_adapter(str(i), random_adapter(llm, i, rank))
    ids, brief = prompts(16), replace(GREEDY, max_tokens=20)
    named = [None if i % 6 == 5 else [(str(i % 6), 1.0)] for i in range(16)]
    named[3] = [("0", 0.5), ("1", -1.0), ("2", 0.7)]
    together = llm.generate(ids, brief, lora=named)
    assert len({tuple(output.token_ids) for output in together}) == 16
    order = np.random.default_rng(1).permutation(16)
    shuffled = llm.generate([ids[i] for i in order], brief, lora=[named[i] for i in order])
    assert [said(output) for output in shuffled] == [said(together[i]) for i in order]
    for prompt, adapters, output in zip(ids, named, together, strict=True):
        assert said(llm.generate([prompt], brief, lora=[adapters])[0]) == said(output)


@pytest.mark.slow
@pytest.mark.unoptimized
def test_a_row_says_what_the_folded_model_says(small_model: Path, tmp_path: Path):
    llm = LLM(
        small_model, ctx_size=256, max_num_seqs=8, dtype="float32", max_loras=2
    )  # fewer than there are adapters
    ids, files = prompts(16), {}
    for i in range(5):
        files[str(i)] = tmp_path / f"{i}.gguf"
        write_gguf(random_adapter(llm, i, rank=4), llm.model.base, files[str(i)])
        llm.load_adapter(str(i), files[str(i)])
    named = [None if i % 6 == 5 else str(i % 6) for i in range(16)]
    together = [output.token_ids for output in llm.generate(ids, GREEDY, lora=named)]
    for name in {*named}:
        folded = LLM(
            small_model,
            ctx_size=256,
            max_num_seqs=8,
            dtype="float32",
            fold=[] if name is None else [files[name]],
        )
        mine = [i for i in range(16) if named[i] == name]
        alone = [output.token_ids for output in folded.generate([ids[i] for i in mine], GREEDY)]
        assert [together[i] for i in mine] == alone


@pytest.mark.unoptimized
def test_adapters_come_and_go_while_others_run(tiny_model: Path, tmp_path: Path):
    broken = tmp_path / "broken.gguf"
    llm = LLM(tiny_model, ctx_size=128, max_num_seqs=4, max_loras=2, max_lora_rank=16)
    first, second = random_adapter(llm, 1, 8), random_adapter(llm, 2, 16)
    llm.engine.load_adapter("first", first)
    wanted = said(llm.generate([[5, 6, 7]], GREEDY, lora="first")[0])
    llm.engine.warmup()
    running = Request("r", (5, 6, 7), GREEDY, seed=0, adapters=(("first", 1.0),))
    llm.engine.add_request(running)
    found: list[GenerationOutput] = []
    with count_compilations() as compiled:
        for step in range(60):
            if step == 5:
                llm.engine.load_adapter("second", second)
                llm.engine.add_request(replace(running, id="s", adapters=(("second", 1.0), ("first", -0.5))))
            if step == 9:
                with pytest.raises(RequestError, match="'first' is used by 2 requests"):
                    llm.unload_adapter("first")
                broken.write_bytes(b"GGUF but no more")
                with pytest.raises(ModelFileError, match="broken"):
                    llm.load_adapter("third", broken)
            found += [d.output for d in llm.engine.step() if d.output is not None]
    assert not compiled
    assert said(next(output for output in found if output.request_id == "r")) == wanted
    llm.unload_adapter("first")
    with pytest.raises(RequestError, match="'first' is not loaded; loaded: second"):
        llm.generate([[5, 6, 7]], GREEDY, lora="first")


def test_a_larger_rank_disturbs_nobody(tiny_model: Path):
    llm = LLM(tiny_model, ctx_size=128, max_num_seqs=4)
    llm.engine.load_adapter("small", random_adapter(llm, 1, 3))
    wanted = said(llm.generate([[5, 6, 7]], GREEDY, lora="small")[0])
    request = Request("r", (5, 6, 7), GREEDY, seed=0, adapters=(("small", 1.0),))
    llm.engine.add_request(request)
    for _ in range(9):
        llm.engine.step()
    large = random_adapter(llm, 2, 40)
    llm.engine.load_adapter("large", large)
    found = [d.output for _ in range(80) for d in llm.engine.step() if d.output is not None]
    if llm.model.numerics.kernels == "native":  # XLA's sum of more ranks may end in other bits
        assert said(found[0]) == wanted
    assert found[0].token_ids == wanted[0]
    assert llm.generate([[5, 6, 7]], GREEDY, lora="large")[0].token_ids != wanted[0]


@pytest.mark.unoptimized
def test_another_adapter_of_the_same_name_reuses_nothing(tiny_model: Path):
    llm = LLM(tiny_model, ctx_size=256, max_num_seqs=4)
    prompt = prompts(1)[0] * 3
    outputs = []
    for seed in (1, 2, 1):
        llm.engine.load_adapter("a", random_adapter(llm, seed, 4))
        outputs.append(llm.generate([prompt[:150]], GREEDY, lora="a")[0])
        llm.unload_adapter("a")
    assert [output.usage.cached_tokens for output in outputs] == [0, 0, 0]
    assert said(outputs[0]) == said(outputs[2]) != said(outputs[1])


@pytest.mark.unoptimized
def test_what_cannot_be_named_is_refused(tiny_model: Path):
    llm = LLM(tiny_model, ctx_size=128)
    good = random_adapter(llm, 1, 4)
    head = {"output.weight": LowRank(np.ones((2, 64), np.float32), np.ones((VOCAB, 2), np.float32), 1.0)}
    for bad, message in (
        (replace(good, magnitudes={"blk.0.attn_q.weight": np.ones(64, np.float32)}), "is a DoRA"),
        (replace(good, deltas=head), "changes output.weight"),
        (replace(good, replaced={"output_norm.weight": np.ones(64, np.float32)}), "replaces output_norm"),
        (random_adapter(llm, 1, 600), "rank is 600; 512"),
        (Adapter("empty", {}), "empty changes nothing"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            llm.engine.load_adapter("bad", bad)
    llm.engine.load_adapter("a", good)
    with pytest.raises(RequestError, match="'a' is loaded already"):
        llm.engine.load_adapter("a", good)
    for named, message in (
        ("b", "adapter 'b' is not loaded; loaded: a"),
        ([("a", 1.0)] * 5, "names 5 adapters; 4 is the most"),
        ([("a", float("nan"))], "scale of adapter 'a' is nan; give"),
    ):
        with pytest.raises(RequestError, match=message):
            llm.generate([[1, 2]], GREEDY, lora=[named])
    assert not llm.engine.has_work


@pytest.mark.unoptimized
def test_the_command_line_folds_and_registers(small_model: Path, tmp_path: Path):
    llm = LLM(small_model, ctx_size=128, dtype="float32", max_num_seqs=4)
    adapter = tmp_path / "a.gguf"
    write_gguf(random_adapter(llm, 3, rank=4), llm.model.base, adapter)
    llm.load_adapter("a", adapter)
    ask = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0}
    lines = [
        {"id": "0"},
        {"id": "1", "lora": "a"},
        {"id": "2", "lora": [["a", -1.5]]},
        {"id": "3", "model": "a"},
    ]
    lines += [{"id": "4", "lora": "b"}, {"id": "5", "lora": 7}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(ask | line) + "\n" for line in lines))
    run = ("-m", small_model, "-c", "128", "--dtype", "float32")
    done = realm("batch", source, "-o", target, *run, "--max-num-seqs", 4, "--lora", f"a={adapter}")
    assert done.code == 0, done.err
    rows = {row["custom_id"]: row for row in map(json.loads, target.read_text().splitlines())}
    for key, named in (("0", None), ("1", "a"), ("2", [("a", -1.5)]), ("3", "a")):
        wanted = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8, temperature=0), lora=[named])[0].text
        assert rows[key]["response"]["body"]["choices"][0]["text"] == wanted
    assert rows["4"]["error"]["message"] == "adapter 'b' is not loaded; loaded: a"
    assert "lora is 7; it must be an adapter's name" in rows["5"]["error"]["message"]

    ask = ("generate", "hello", *run, "--raw", "-n", "8", "--temperature", "0")
    folded = LLM(small_model, ctx_size=128, dtype="float32", fold=[(adapter, -1.5)], max_num_seqs=4)
    wanted = folded.generate(["hello"], SamplingParams(max_tokens=8, temperature=0))[0].text
    assert realm(*ask, "--lora", f"{adapter}:-1.5").out == wanted + "\n"
    assert realm(*ask, "--lora", f"a={adapter}").error == (
        f"--lora a={adapter}: nothing here can name an adapter; fold it with --lora {adapter}"
    )


@pytest.mark.unoptimized
def test_a_load_that_fails_is_done_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    llm = LLM(tiny_model, ctx_size=128, max_num_seqs=4)
    llm.engine.load_adapter("a", random_adapter(llm, 1, 4))
    llm.engine.load_adapter("b", random_adapter(llm, 2, 4))
    ask = ([[5, 6, 7]], replace(GREEDY, max_tokens=8))
    wanted = {name: said(llm.generate(*ask, lora=name)[0]) for name in ("a", "b")}

    def fails(*_: object) -> NoReturn:
        raise MemoryError

    for call in (lambda: llm.generate(*ask, lora="a"), lambda: llm.logits([1, 2], lora="a")):
        llm.unload_adapter("a")
        llm.engine.load_adapter("a", random_adapter(llm, 1, 4))
        with monkeypatch.context() as patch:
            patch.setattr(registry, "put", fails)
            with pytest.raises(MemoryError):
                call()
        for name in ("a", "b"):
            assert said(llm.generate(*ask, lora=name)[0]) == wanted[name]


def test_memory_counts_the_bank(small_model: Path):
    alone = LLM(small_model, ctx_size=128, max_num_seqs=4)
    needed = bank_bytes(alone.model.config, alone.model.numerics, 8, 16)
    weights = resident_bytes(alone.model.params) + cached_bytes(alone.model.config, "bfloat16") * 128 * 4
    for spare, fits in ((needed + 10_000, True), (needed - 10_000, False)):
        llm = LLM(small_model, ctx_size=128, max_num_seqs=4, memory=weights + spare)
        if fits:
            llm.engine.load_adapter("a", random_adapter(llm, 1, 4))
            continue
        with pytest.raises(CapacityError, match=r"8 adapters of rank 4 take .* MB; memory leaves"):
            llm.engine.load_adapter("a", random_adapter(llm, 1, 4))
        assert not llm.engine.adapters.named
