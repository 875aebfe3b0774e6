"""Distils a draft for speculative decoding from a model. Prints figures as one JSON object.

The draft has the model's embedding, head, last norm and some of its layers, which learn from the model's own
text what the model finds likely. Agreement is teacher-forced: the draft sees what the model wrote.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import jax
from draft_file import Draft, kept_layers, tensors
from draft_text import Answer, Collection, collect, greedy_answers
from draft_training import Distillation, Trained, train

from realm_jax import LLM, SamplingParams, gguf
from realm_jax.config import EngineConfig
from realm_jax.errors import RealmError, RequestError
from realm_jax.ggml import GGMLType
from realm_jax.loading import load_model
from realm_jax.quant.encoding import ENCODERS

CONTEXT = 320
SEQUENCES = 32
HELD_OUT = 48
"""Greedy answers to the model's own questions, kept from training."""

LENGTHS = (2, 4, 8)
"""Tokens that a draft proposes at a time."""

GENERATION = 0.45
"""Its share of the time."""

ASKED = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain to a child why the sky is blue.",
    "How do I boil an egg?",
    "Write a Python function that reverses a string.",
    "Give me three tips for a job interview.",
    "Translate 'good morning' into Spanish, French and German.",
    "Summarize the story of Romeo and Juliet in three sentences.",
    "What are the advantages and disadvantages of electric cars?",
    "Write a polite email that declines an invitation.",
    "A train travels 120 km in two hours. What is its average speed?",
    "List five mammals that live in the ocean.",
)
"""Questions that a person asked: whether the draft serves more than what the model would ask itself."""


@dataclass(frozen=True)
class Text:
    """What the model said: to learn from, to measure by, and in answer to a person's questions."""

    learned: list[Answer]
    held_out: list[Answer]
    asked: list[Answer]
    seconds: float


def measure(path: Path, answers: Sequence[Answer]) -> dict[str, Any]:
    """How well the draft in the file foresees the answers, token by token.

    loss: of the model's tokens, in nats. agreement: the share of positions at which the draft's likeliest
    token is the model's. tokens_a_step: by the draft's length, the tokens that each step of the model brings,
    those that were foreseen and one of its own.
    """
    llm = LLM(path, ctx_size=CONTEXT + 64, max_num_seqs=SEQUENCES)
    outputs = llm.generate(
        [answer.ids.tolist() for answer in answers], SamplingParams(max_tokens=0, prompt_logprobs=0)
    )
    known = [
        [each for each in (output.prompt_logprobs or [])[answer.start :] if each is not None]
        for output, answer in zip(outputs, answers, strict=True)
    ]
    foreseen = [[each["is_greedy"] for each in entries] for entries in known]
    count = sum(map(len, foreseen))
    return {
        "answers": len(answers),
        "tokens": count,
        "loss": round(-fsum(each["logprob"] for entries in known for each in entries) / count, 4),
        "agreement": round(sum(map(sum, foreseen)) / count, 4),
        "tokens_a_step": {n: round(count / sum(steps(each, n) for each in foreseen), 3) for n in LENGTHS},
    }


def steps(foreseen: Sequence[bool], length: int) -> int:
    """How many steps of the model an answer takes with drafts of so many tokens."""
    at = count = 0
    while at < len(foreseen):
        agreed = next((i for i, hit in enumerate(foreseen[at : at + length]) if not hit), length)
        at += agreed + 1
        count += 1
    return count


def measured(path: Path, text: Text) -> dict[str, Any]:
    """The draft's figures on the model's own questions, and on those of a person."""
    return {"held_out": measure(path, text.held_out), "asked": measure(path, text.asked)}


def split(answers: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Answers to train on, and greedy ones that are kept from it: at most a quarter."""
    greedy = [i for i, answer in enumerate(answers) if answer.is_greedy]
    kept = set(greedy[: min(HELD_OUT, len(answers) // 4)])
    if not kept:
        raise RequestError(f"there are {len(answers)} answers, too few to keep any from training")
    return (
        [answer for i, answer in enumerate(answers) if i not in kept],
        [answers[i] for i in sorted(kept)],
    )


def distilled(
    draft: Draft, initial: Path, output: Path, answers: Sequence[Answer], config: Distillation, seconds: float
) -> Trained:
    """`output` holds the draft, trained from what `initial` holds."""
    model = load_model(initial, EngineConfig(ctx_size=CONTEXT, dtype="float32"))
    trained = train(model, answers, config, seconds, say_step)
    draft.write(output, tensors(trained.params, model.config))
    return trained


def say_step(step: int, total: int, loss: float) -> None:
    if step == 1 or step % 10 == 0:
        say(f"step {step} of at most {total}: divergence {loss:.4f}")


def gathered(llm: LLM, wanted: Collection, deadline: float) -> Text:
    """The model's text."""
    start = time.perf_counter()

    def on_round(count: int, tokens: int) -> None:
        say(f"{count} answers, {tokens} tokens, {time.perf_counter() - start:.0f} s")

    asked = greedy_answers(llm, ASKED)
    learned, held_out = split(collect(llm, wanted, deadline, on_round))
    return Text(learned, held_out, asked, time.perf_counter() - start)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The draft is written; its figures."""
    start = time.perf_counter()
    end = start + 60 * options.minutes
    check(options)
    llm = LLM(options.model, ctx_size=CONTEXT, max_num_seqs=SEQUENCES)
    with gguf.open(llm.model.path) as file, tempfile.TemporaryDirectory() as folder:
        draft = Draft(
            file, kept_layers(llm.model.config.num_layers, options.layers), GGMLType[options.type.upper()]
        )
        initial = Path(folder, "initial.gguf")
        draft.write(initial)
        wanted = Collection(options.tokens, options.seed)
        text = gathered(llm, wanted, start + GENERATION * (end - start))
        begun = time.perf_counter()
        before = measured(initial, text)
        say(f"before: {before}")
        now = time.perf_counter()
        left = max(end - now - (now - begun), 1.0)  # it is measured once more
        config = Distillation(seed=options.seed, epochs=options.epochs)
        trained = distilled(draft, initial, options.output, text.learned, config, left)
    after = measured(options.output, text)
    say(f"after: {after}")
    return {
        "model": llm.model.path.name,
        **described(options.output),
        "layers_of_model": list(draft.layers),
        "data": {**counted(text.learned), "seconds": round(text.seconds, 1)},
        "training": summary(trained),
        "before": before,
        "after": after,
        "seconds": round(time.perf_counter() - start, 1),
        "device": jax.default_backend(),
    }


def check(options: argparse.Namespace) -> None:
    """Raises RequestError for what would otherwise be found after the training, or not at all."""
    if not options.output.parent.is_dir():
        raise RequestError(f"{options.output.parent} is no folder; -o names a file in one that is there")
    for name, least in (("tokens", 1), ("epochs", 1), ("minutes", 0.1), ("seed", 0)):
        if not (value := getattr(options, name)) >= least:
            raise RequestError(f"{name} is {value}; it must be at least {least}")


def counted(answers: Sequence[Answer]) -> dict[str, int]:
    return {
        "answers": len(answers),
        "greedy": sum(answer.is_greedy for answer in answers),
        "tokens": sum(answer.count for answer in answers),
    }


def summary(trained: Trained) -> dict[str, Any]:
    """divergence: the mean of the first 20 steps and of the last, in nats."""
    return {
        "steps": len(trained.losses),
        "tokens": trained.tokens,
        "divergence": [round(mean(part), 4) for part in (trained.losses[:20], trained.losses[-20:])],
        "seconds": round(trained.seconds, 1),
    }


def described(path: Path) -> dict[str, Any]:
    """What the file holds."""
    with gguf.open(path) as file:
        shapes = [tensor.shape for tensor in file.tensors.values()]
        return {
            "name": file.metadata["general.name"],
            "parameters": sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes),
            "file_mb": round(file.nbytes / 1e6, 1),
            "types": sorted({tensor.ggml_type.name for tensor in file.tensors.values()}),
        }


def mean(values: Sequence[float]) -> float:
    return fsum(values) / max(len(values), 1)


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: scripts/distill_draft -o draft.gguf --minutes 25"
    )
    parser.add_argument("-m", "--model", help="the model to foresee (default: the default model)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.gguf")
    parser.add_argument("--layers", type=int, default=2, help="of the draft (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=1_000_000, help="of answers, at most (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=6, help="at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=25, help="for everything (default: %(default)s)")
    parser.add_argument(
        "--type", default="q4_0", choices=[kind.name.lower() for kind in ENCODERS], help="of matrices"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    options = parsed()
    try:
        print(json.dumps(run(options)))
    except RealmError as error:
        say(f"error: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
