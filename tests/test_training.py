"""Training as a whole: the loss falls, what was killed ends as if it had not been, adapters are served."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from command_line import realm, start
from conftest import count_compilations
from tiny import write_model

from realm_jax import LLM, runtime
from realm_jax.config import EngineConfig, MoEConfig
from realm_jax.errors import ModelFileError, RequestError, UnsupportedError
from realm_jax.loading import LoadedModel, load_model
from realm_jax.model import Transformer
from realm_jax.scoring import logits
from realm_jax.training import Checkpoints, Reader, Trainer, TrainingConfig, write_adapter
from realm_jax.training.targets import adapted, chosen_parts, deltas

WORDS = ("red", "blue", "green", "white")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: what takes time is to compile."""
    return write_model(tmp_path_factory.mktemp("small") / "small.gguf", layers=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of two lengths, whose answers repeat a word of them."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    with path.open("w") as file:
        for i in range(24):
            word = WORDS[i % 4]
            user = {"role": "user", "content": word + " and so on" * (2 * (i % 3 == 0))}
            file.write(json.dumps({"messages": [user, {"role": "assistant", "content": word}]}) + "\n")
    return path


def prepared(model: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(ctx_size=128, **options)
    runtime.configure(config)
    return load_model(model, config)


def trainer(model: LoadedModel, data: Path, folder: Path | None = None, **settings: Any) -> Trainer:
    settings = {"rank": 4, "alpha": 8.0, "lr": 1e-2, "batch_size": 4, "epochs": 2} | settings
    examples, _ = Reader(model.tokenizer, model.template, model.context).read(data)
    kept = None if folder is None else Checkpoints(folder, {"settings": "as before"})
    return Trainer(model, examples, TrainingConfig(**settings), kept)


def flat(each: Trainer) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(each.factors)])


@pytest.mark.slow
def test_an_adapter_is_trained_interrupted_and_served(model_file: Path, data: Path, tmp_path: Path):
    """Interrupted, it ends as if it had not been, bit for bit, with dropout and evaluations. Nothing compiles
    after the first use of each length. What was trained is what is served.
    """
    model = prepared(model_file, dtype="float32")
    options: dict[str, Any] = {
        "dropout": 0.1,
        "eval_split": 0.2,
        "grad_accum": 2,
        "epochs": 8,
        "patience": 50,
    }
    whole = trainer(model, data, **options)
    with count_compilations() as compiled:
        counts = []
        whole.run(lambda progress: counts.append((progress.step, len(compiled))))
    first_epoch = -(-whole.batches.per_epoch // 2)
    assert {n for step, n in counts if step > first_epoch} == {counts[-1][1]} and counts[0][1] > 0
    losses = whole.history.losses
    assert losses[-1] < 0.3 * losses[0] and len(whole.history.evaluations) == whole.steps // (
        first_epoch - 1 or 1
    )

    stopped = trainer(model, data, tmp_path / "kept", **options)

    def interrupt(progress: Any) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped.run(interrupt)
    resumed = trainer(model, data, tmp_path / "kept", **options)
    resumed.resume()
    assert resumed.history.step == 5 and resumed.history == stopped.history
    resumed.run()
    assert resumed.history == whole.history
    assert flat(resumed).tobytes() == flat(whole).tobytes()

    path = write_adapter(whole, model, tmp_path / "out")
    ids = model.tokenizer.encode("user: blue\nassistant: ")
    changes = deltas(whole.factors, whole.config.scale)
    wanted = logits(
        Transformer(model.config), adapted(model.params, model.config, changes), ids, model.numerics
    )
    llm = LLM(
        model_file, dtype="float32", ctx_size=128, lora={"gguf": path, "peft": tmp_path / "out" / "peft"}
    )
    for name in ("gguf", "peft"):
        np.testing.assert_allclose(llm.logits(ids, lora=name), wanted, atol=2e-4)
    assert np.abs(llm.logits(ids) - wanted).max() > 0.1


@pytest.mark.slow
def test_a_killed_training_ends_like_another(model_file: Path, data: Path, tmp_path: Path):
    """SIGKILL at some moment after a checkpoint, through the command line, in the default arithmetic."""
    common = [
        "lora",
        "train",
        data,
        "-m",
        model_file,
        "-c",
        128,
        "--rank",
        2,
        "--lr",
        0.01,
        "--batch-size",
        4,
    ]
    common += ["--targets", "q,v_proj,ffn_down", "--steps", 12, "--save-every", 1]
    foreign = tmp_path / "whole" / "checkpoints" / "llama-8b"
    foreign.mkdir(parents=True)
    done = realm(*common, "-o", tmp_path / "whole", "--json")
    assert done.code == 0, done.err
    assert foreign.is_dir()  # only what a training wrote is deleted
    facts = json.loads(done.out)
    assert facts["steps"] == 12 and Path(facts["adapter"]).is_file()
    kept = tmp_path / "killed" / "checkpoints"
    with start(*common, "-o", tmp_path / "killed") as process:
        deadline = time.monotonic() + 100
        while not (kept / "2").exists() and not (kept / "3").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert "--resume continues it" in realm(*common, "-o", tmp_path / "killed").error
    other = [*common[:-1], 1, "--rank", 3]
    assert "began with rank 2, not 3" in realm(*other, "-o", tmp_path / "killed", "--resume").error
    done = realm(*common, "-o", tmp_path / "killed", "--resume")
    assert done.code == 0 and done.out == f"{tmp_path / 'killed' / 'adapter.gguf'}\n", done.err
    stories = [json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "killed")]
    assert stories[0] == stories[1]
    adapters = [
        (tmp_path / name / "peft" / "adapter_model.safetensors").read_bytes() for name in ("whole", "killed")
    ]
    assert adapters[0] == adapters[1]


def test_training_stops_when_evaluations_grow_no_better(model_file: Path, data: Path):
    """A learning rate that ruins the model: the best adapter is the result, not the last."""
    model = prepared(model_file, dtype="float32")
    settings = {"lr": 0.5, "eval_split": 0.2, "patience": 2, "epochs": 30, "eval_every": 1, "warmup": 0}
    each = trainer(model, data, **settings)
    each.run()
    step, best = each.history.best or (0, 0.0)
    assert each.history.step == step + 2 < each.steps
    assert each.evaluate(each.factors) == best


def test_a_broken_checkpoint_is_an_error_that_names_it(model_file: Path, data: Path, tmp_path: Path):
    model = prepared(model_file, dtype="float32")
    each = trainer(model, data, tmp_path)
    each.save()
    (tmp_path / "7.orbax-checkpoint-tmp-1").mkdir()  # what a kill leaves is no checkpoint
    again = trainer(model, data, tmp_path)
    again.resume()
    assert again.history == each.history and flat(again).tobytes() == flat(each).tobytes()
    for file in (tmp_path / "0" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"0 is broken: .*delete it"):
        trainer(model, data, tmp_path).resume()


def test_targets_are_named_in_three_ways(model_file: Path):
    config = prepared(model_file, dtype="float32").config
    names = [set(chosen_parts(config, targets)) for targets in (["q", "down"], ["attn_q", "ffn_down"])]
    assert names[0] == names[1] == {f"blk.0.{n}.weight" for n in ("attn_q", "ffn_down")}
    assert set(chosen_parts(config, ["q_proj", "down_proj"])) == names[0]
    assert len(chosen_parts(config, ["all"])) == 7
    with pytest.raises(RequestError, match="'qkv' is no matrix of this model; it has q, k, v, o, gate"):
        chosen_parts(config, ["qkv"])


def test_what_cannot_be_trained_is_said_in_one_line(
    model_file: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    common = ["lora", "train", data, "-m", model_file, "-o", tmp_path / "out"]
    assert realm(*common, "--rank", 0).error.startswith("rank is 0; it must be a whole number from 1")
    assert "lr is nan" in realm(*common, "--lr", "nan").error
    assert "set eval_split" in realm(*common, "--patience", 2).error
    assert "'embed' is no matrix" in realm(*common, "--targets", "embed").error
    (tmp_path / "bad.jsonl").write_text("{}\n")
    assert (
        "bad.jsonl, line 1: fields are none" in realm(*common[:2], tmp_path / "bad.jsonl", *common[3:]).error
    )
    assert "no such file" in realm(*common[:2], tmp_path / "none", *common[3:]).error.lower()
    assert "tokens; the context is 8 (raise --ctx-size" in realm(*common, "-c", 8).error
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    assert "file: Not a directory" in realm(*common[:-1], tmp_path / "file").error
    monkeypatch.setitem(sys.modules, "optax", None)
    assert "pip install 'realm-jax[train]'" in realm(*common).error


def test_experts_are_refused(model_file: Path):
    config = replace(prepared(model_file, dtype="float32").config, moe=MoEConfig(4, 2, 64))
    assert len(chosen_parts(config, ["q", "v"])) == 2
    assert len(chosen_parts(config, ["q", "k", "v", "o"])) == 4
    for targets in (["all"], ["down"]):
        with pytest.raises((UnsupportedError, RequestError), match=r"experts|no matrix"):
            chosen_parts(config, targets)
