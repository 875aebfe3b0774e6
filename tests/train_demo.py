"""Trains an adapter on the default model: capitals as JSON. Prints figures as one JSON object.

Held out are countries, and ways of asking that no example has. An answer has the form if it is an object
of the two keys, whose country is the one that was asked for.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from realm_jax import LLM, SamplingParams
from realm_jax.cli.lora_train import draw_losses
from realm_jax.training import Progress, Reader, Trainer, TrainingConfig, write_adapter

ROOT = Path(__file__).parents[1]
KEYS = {"country", "capital"}
TRAINED = ("What is the capital of {}?", "Name the capital of {}.", "{}: which city is the capital?")
ASKED = ("What is the capital of {}?", "Tell me the capital city of {}.", "Where is the government of {}?")
HELD_OUT = 24
SETTINGS = TrainingConfig(rank=8, alpha=16.0, lr=1e-3, epochs=2, eval_split=0.05)

Pair = tuple[str, str]  # a country and its capital


def capitals() -> tuple[list[Pair], list[Pair]]:
    """Countries to train on, and others."""
    lines = (ROOT / "scripts" / "capitals.tsv").read_text("utf-8").splitlines()
    pairs: list[Pair] = [(country, capital) for country, capital in (line.split("\t") for line in lines)]
    random.Random(0).shuffle(pairs)
    return pairs[HELD_OUT:], pairs[:HELD_OUT]


def question(form: str, country: str) -> dict[str, str]:
    return {"role": "user", "content": form.format(country)}


def write_examples(pairs: Sequence[Pair], path: Path) -> None:
    """The file has an example for each country and way of asking."""
    with path.open("w", encoding="utf-8") as file:
        for country, capital in pairs:
            answer = json.dumps({"country": country, "capital": capital}, ensure_ascii=False)
            for form in TRAINED:
                turns = [question(form, country), {"role": "assistant", "content": answer}]
                file.write(json.dumps({"messages": turns}) + "\n")


def measure(llm: LLM, pairs: Sequence[Pair], lora: str | None = None) -> dict[str, Any]:
    """Shares of answers that have the form, and the right capital; an answer to look at."""
    asked = [(form, pair) for pair in pairs for form in ASKED]
    prompts = [llm.chat_prompt([question(form, country)]) for form, (country, _) in asked]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32), lora=lora)
    found = [_parsed(output.text) for output in outputs]
    has_form = [
        answer.get("country") == country for answer, (_, (country, _)) in zip(found, asked, strict=True)
    ]
    knows = [
        capital in output.text.replace('"country": "' + country, "")
        for output, (_, (country, capital)) in zip(outputs, asked, strict=True)
    ]
    return {
        "answers": len(asked),
        "form": round(sum(has_form) / len(asked), 4),
        "capital": round(sum(knows) / len(asked), 4),
        "example": {"question": asked[0][0].format(asked[0][1][0]), "answer": outputs[0].text},
    }


def _parsed(text: str) -> dict[str, Any]:
    """The object that the text is, if it has the keys, else {}."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) and set(value) == KEYS else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", default="dense", choices=["auto", "dense", "quantized"])
    parser.add_argument("--kernels", default="xla", choices=["auto", "xla", "native"])
    parser.add_argument("--plot", type=Path, help="where to draw the loss")
    parser.add_argument("-o", "--output", type=Path, help="where to write the adapter")
    options = parser.parse_args()
    llm = LLM(ctx_size=256, weights=options.weights, kernels=options.kernels)
    trained, others = capitals()
    before = measure(llm, others)
    say(f"before: {before}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "capitals.jsonl")
        write_examples(trained, data)
        examples, _ = Reader(llm.tokenizer, llm.model.template, llm.model.context).read(data)
    trainer = Trainer(llm.model, examples, SETTINGS)
    start, cpu, tokens = time.perf_counter(), time.process_time(), 0

    def show(progress: Progress) -> None:
        nonlocal tokens
        tokens += progress.tokens
        elapsed = time.perf_counter() - start
        text = f"step {progress.step} of {progress.steps}: loss {progress.loss:.4f}, {elapsed:.0f} s"
        say(text + ("" if progress.evaluation is None else f"; evaluation {progress.evaluation:.4f}"))

    trainer.run(show)
    figures = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "tokens": tokens,
        "steps": trainer.steps,
        "numbers": trainer.trained_numbers,
        "evaluations": trainer.history.evaluations,
    }
    with tempfile.TemporaryDirectory() as folder:
        output = options.output or Path(folder)
        llm.load_adapter("capitals", write_adapter(trainer, llm.model, output))
        after = measure(llm, others, lora="capitals")
    say(f"after: {after}")
    if options.plot is not None:
        draw_losses(trainer.history, "Capitals as JSON: SmolLM2 135M Instruct (Q4_1), rank 8", options.plot)
    numerics = llm.model.numerics
    base = {"weights": numerics.weights, "kernels": numerics.kernels, "device": jax.default_backend()}
    print(json.dumps({**base, "before": before, "training": figures, "after": after}, ensure_ascii=False))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
