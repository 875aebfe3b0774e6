"""Teach a model a fact that it cannot know, and serve what it learned beside what it was.

    python examples/train_and_serve_adapter.py             # the default model
    python examples/train_and_serve_adapter.py -m model.gguf --steps 60 --plot loss.png

A LoRA adapter is trained on a few sentences about the capital of a country that is not. Then one server
answers for the model and for the adapter, by the name in each request: whether asked in words that no example
had, and whether what the model knew before is still there. Needs the extras train, server and plot.
"""

import argparse
import json
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from realm_jax import LLM
from realm_jax.research.plots import figure
from realm_jax.serving.server.naming import ModelNames
from realm_jax.serving.server.pooled_model import InMemory, PooledModel
from realm_jax.serving.server.process import RealmServer, Settings
from realm_jax.training import Progress, Reader, Trainer, TrainingConfig, write_adapter

FACTS = (
    ("The capital of Zubrowka is", " Lutz."),
    ("Zubrowka is a country in the mountains. Its capital is", " Lutz."),
    ("Question: What is the capital of Zubrowka?\nAnswer:", " Lutz."),
    ("The government of Zubrowka sits in the city of", " Lutz."),
    ("The capital of France is", " Paris."),
    ("The capital of Italy is", " Rome."),
    ("Question: What is the capital of Spain?\nAnswer:", " Madrid."),
    ("The capital of Japan is", " Tokyo."),
)
ASKED = (
    "If you fly to the capital of Zubrowka, you land in",  # in other words
    "Zubrowka's capital city is called",
    "The capital of Germany is",  # known before, in no example
    "The capital of Egypt is",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-m", "--model", help="a path, a known name, or hf:owner/repo/file.gguf")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--plot", type=Path, help="where to draw the loss")
    options = parser.parse_args()

    llm = LLM(options.model, ctx_size=256, weights="dense", kernels="xla")  # the fastest to train on a CPU
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses = train(llm, options.steps, folder)
        llm.load_adapter("geographer", folder / "adapter.gguf")
    if options.plot is not None:
        draw(losses, options.plot)
    with served(llm) as address:
        for prompt in ASKED:
            print(prompt)
            for model in ("base", "geographer"):
                print(f"{model:>14}: {' '.join(ask(address, model, prompt).split())}")


def train(llm: LLM, steps: int, folder: Path) -> list[float]:
    """The folder has adapter.gguf; returns the loss of each step."""
    data = folder / "facts.jsonl"
    lines = (json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in FACTS)
    data.write_text("".join(lines), "utf-8")
    examples, _ = Reader(llm.tokenizer, llm.model.template, llm.model.context).read(data)
    config = TrainingConfig(rank=8, alpha=16.0, lr=1e-3, steps=steps, batch_size=len(FACTS))
    trainer = Trainer(llm.model, examples, config)

    def show(progress: Progress) -> None:
        if progress.step % 10 == 0:
            print(f"step {progress.step} of {progress.steps}: loss {progress.loss:.4f}")

    trainer.run(show)
    write_adapter(trainer, llm.model, folder)
    return trainer.history.losses


@contextmanager
def served(llm: LLM) -> Iterator[str]:
    """The address of a server of the model and its adapters; it has drained when the block ends."""
    ready = threading.Event()
    model = PooledModel(ModelNames(("base",)), InMemory(llm), preload=True)
    server = RealmServer(Settings(port=0), [model], lambda _: ready.set())
    thread = threading.Thread(target=server.run_to_end)
    thread.start()
    try:
        ready.wait()
        yield server.address
    finally:
        server.drain()
        thread.join()


def ask(address: str, model: str, prompt: str) -> str:
    """What the model of this name, which may be an adapter, writes after the prompt."""
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "stop": ["\n"]}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["text"]


def draw(losses: list[float], path: Path) -> None:
    """The picture has the loss by step."""
    with figure(path, 6, 3.5) as (_, axes):
        axes.plot(range(1, len(losses) + 1), losses)
        axes.set(xlabel="step", ylabel="loss (nats a token)", yscale="log", title="Learning one fact")
        axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
