"""`realm score`: how likely a model finds a text, or what may follow it."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.processes import ProcessFlags, join
from realm_jax.cli.text import read_text, table
from realm_jax.errors import RequestError

if TYPE_CHECKING:
    from realm_jax.llm import LLM
    from realm_jax.scoring import Score

EXAMPLE = 'realm score "The capital of France is" --continuation " Paris"'


def score(
    *,
    text: Annotated[
        str | None, typer.Argument(help="The text; - reads it from stdin.", metavar="TEXT")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="A file that holds the text.", metavar="FILE")
    ] = None,
    continuation: Annotated[
        list[str] | None,
        typer.Option(help="Score this, coming after the text; repeatable.", metavar="TEXT"),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Show each token's log-probability too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    engine: options.EngineFlags,
    processes: ProcessFlags,
) -> None:
    """Print natural-log probabilities: of a text's tokens, or of continuations of it.

    The text is used as it is, without the model's chat template. With --continuation, one line each:
    log-probability, tokens, whether the model would choose them, and the continuation.

    Example: realm score "The capital of France is" --continuation " Paris" --continuation " Rome"
    """
    sources = [source for source in (text, file) if source is not None]
    if len(sources) != 1:
        raise RequestError(f"give the text once, as argument or with --file; e.g. {EXAMPLE}")
    given = read_text(sources[0])

    from realm_jax.cli.session import Status, open_model

    join(processes, engine)
    status = Status()
    llm = open_model(engine, status, max_num_seqs=max(1, min(len(continuation or ()), 16)))
    if continuation:
        scores = _continuations(llm, given, continuation)
        status.answering()
        _print_continuations(llm, continuation, scores, tokens, as_json)
    else:
        whole = llm.score(given)[0]
        status.answering()
        _print_text(llm, whole, tokens, as_json)


def _continuations(llm: "LLM", text: str, continuations: list[str]) -> "list[Score]":
    """The scores of texts that continue a text whose own tokens stay as they are."""
    context = llm.prompt_ids(text)
    pieces = []
    for continuation in continuations:
        whole = llm.prompt_ids(text + continuation)
        if whole[: len(context)] != context or len(whole) == len(context):
            raise RequestError(
                f"--continuation {continuation!r} does not begin with a token of its own after this text "
                "(let the text end before a space, and the continuation begin with it)"
            )
        pieces.append(whole[len(context) :])
    return llm.score([context] * len(pieces), pieces)


def _print_continuations(
    llm: "LLM", continuations: list[str], scores: "list[Score]", tokens: bool, as_json: bool
) -> None:
    if as_json:
        rows = [
            {"text": text, "logprob": each.total, "is_greedy": each.is_greedy, **_token_lists(each)}
            for text, each in zip(continuations, scores, strict=True)
        ]
        print(json.dumps({"continuations": rows}, ensure_ascii=False))
        return
    lines = table(
        (
            f"{each.total:.4f}",
            _counted(len(each.token_ids)),
            "greedy" if each.is_greedy else "not greedy",
            repr(text),
        )
        for text, each in zip(continuations, scores, strict=True)
    )
    for line, each in zip(lines.splitlines(), scores, strict=True):
        print(line)
        if tokens:
            _print_tokens(llm, each)


def _print_text(llm: "LLM", whole: "Score", tokens: bool, as_json: bool) -> None:
    count = sum(p is not None for p in whole.logprobs)
    if not count:
        raise RequestError("the text has no token with one before it, so there is nothing to score")
    perplexity = math.exp(-whole.total / count)
    if as_json:
        facts = {"logprob": whole.total, "perplexity": perplexity, "tokens": count, **_token_lists(whole)}
        print(json.dumps(facts))
        return
    if tokens:
        _print_tokens(llm, whole)
    print(f"log-probability {whole.total:.4f}, perplexity {perplexity:.4f}, {_counted(count)}")


def _print_tokens(llm: "LLM", each: "Score") -> None:
    """One line a token: id, log-probability, piece."""
    for token, logprob in zip(each.token_ids, each.logprobs, strict=True):
        shown = "-" if logprob is None else f"{logprob:.4f}"
        print(f"{token:7d}  {shown:>9}  {llm.tokenizer.token_text(token)!r}")


def _token_lists(each: "Score") -> dict[str, object]:
    return {"token_ids": each.token_ids, "logprobs": each.logprobs}


def _counted(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens:,} tokens"
