"""Speculative beside plain decoding, in turn in one process, as JSON: the same prompts, the same tokens.

Of one sequence the time from its first token to the last, of several that of the whole; what became of the
guesses; medians over rounds. The works are chats, grounded in a text that is given or not.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

from realm_jax import LLM, SamplingParams

STORY = (
    "The sun was setting over the quiet village as the farmers returned from the feilds. Children played "
    "near the old stone bridge while their mothers prepared dinner. A soft wind moved through the tall "
    "trees, carrying the smell of fresh bread from the bakery. The baker, an old man with a long white "
    "beard, was closing his shop for the day. He had worked there for more than forty years, and "
    "everybody in the village knew his name. On the other side of the river, the miller was counting the "
    "sacks of flour that he would sell at the market on Saturday morning."
)
CODE = "\n\n".join(
    f"def {name}(a, b):\n    return a {sign} b"
    for name, sign in (("add", "+"), ("subtract", "-"), ("multiply", "*"), ("divide", "/"))
)
TABLE = "\n".join(
    f"{name},{i * 7 % 50 + 20},{city}"
    for i, (name, city) in enumerate(
        (("Anna", "Berlin"), ("Boris", "Oslo"), ("Clara", "Lima"), ("David", "Rome"), ("Emma", "Cairo"))
    )
)
WORKS = {
    "edit a text": f"Repeat the following text exactly, but correct the spelling mistakes:\n\n{STORY}",
    "summarize": f"Summarize this text in three sentences, in its own words:\n\n{STORY}",
    "extend code": f"```python\n{CODE}\n```\n\nWrite this file again, with a docstring in each function.",
    "table to JSON": f"Turn this table into a JSON list of objects with name, age and city:\n\n{TABLE}",
    "chat: bread": "Tell me about the history of bread.",
    "chat: chess": "How do I learn to play chess well?",
    "chat: story": "Write a short story about a lighthouse keeper.",
    "chat: rain": "Why does it rain more in some places than in others?",
}


def main() -> None:
    options = _options()
    how = {"spec_type": options.spec_type, "spec_tokens": options.spec_tokens}
    draft = {} if options.draft_model is None else {"draft_model": options.draft_model, "spec_type": "draft"}
    config = {"model": options.model, "max_num_seqs": options.batch}
    plain, guessing = LLM(**config), LLM(**config | how | draft)
    for llm in (plain, guessing):
        llm.engine.warmup()
    params = SamplingParams(temperature=options.temperature, max_tokens=options.n, seed=1)
    rows = [measure(name, [text], plain, guessing, params, options.rounds) for name, text in WORKS.items()]
    if options.batch > 1:
        texts = [list(WORKS.values())[i % len(WORKS)] for i in range(options.batch)]
        rows.append(measure(f"{options.batch} at once", texts, plain, guessing, params, options.rounds))
    print(json.dumps({"model": plain.model.path.name, **how, **draft, "rows": rows}))


def measure(
    name: str, texts: list[str], plain: LLM, guessing: LLM, params: SamplingParams, rounds: int
) -> dict[str, Any]:
    """Both in turn; raises AssertionError where they do not say the same."""
    ratios, said = [], dict[int, list[list[int]]]()
    rates: dict[int, list[float]] = {id(plain): [], id(guessing): []}
    before = guessing.engine.drafts
    for i in range(rounds):
        for llm in (plain, guessing) if i % 2 else (guessing, plain):
            tokens, seconds = generate(llm, texts, params)
            said[id(llm)] = tokens
            rates[id(llm)].append(sum(map(len, tokens)) / seconds)
        assert said[id(plain)] == said[id(guessing)], f"{name}: not the same tokens"
        ratios.append(rates[id(guessing)][-1] / rates[id(plain)][-1])
    after = guessing.engine.drafts
    assert before is not None and after is not None
    row = {
        "work": name,
        "tokens": sum(map(len, said[id(plain)])),
        "plain_tps": round(statistics.median(rates[id(plain)]), 1),
        "speculative_tps": round(statistics.median(rates[id(guessing)]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "drafts": after.since(before).json(),
    }
    print(
        f"{name}: {row['plain_tps']} plain, {row['speculative_tps']} speculative, {row['ratio']}x",
        file=sys.stderr,
    )
    return row


def generate(llm: LLM, texts: list[str], params: SamplingParams) -> tuple[list[list[int]], float]:
    """The tokens of each answer, and the seconds they took; of one answer, after its first token."""
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    end = time.perf_counter()
    first = (outputs[0].metrics.first_token_s or 0.0) if len(outputs) == 1 else 0.0
    return [output.token_ids for output in outputs], end - start - first


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_spec",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Example: scripts/bench_spec --batch 16 --rounds 5",
    )
    parser.add_argument("-m", "--model", metavar="REF")
    parser.add_argument("--draft-model", metavar="REF")
    parser.add_argument("--spec-type", default="ngram", choices=("ngram", "draft"))
    parser.add_argument("--spec-tokens", type=int, default=7, metavar="N")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="also so many at once")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X")
    parser.add_argument("-n", type=int, default=128, metavar="N", help="tokens of each answer at most")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
