"""`realm tokenize`: text to token ids, as the model sees it."""

import json
from typing import Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.text import read_text
from realm_jax.errors import RequestError


def tokenize(
    *,
    text: Annotated[str, typer.Argument(help="The text; - reads it from stdin.", metavar="TEXT")],
    ids: Annotated[bool, typer.Option("--ids", help="Print the ids alone, as a JSON list.")] = False,
    count: Annotated[bool, typer.Option("--count", help="Print how many tokens there are.")] = False,
    no_special: Annotated[
        bool, typer.Option("--no-special", help="Neither add nor parse special tokens.")
    ] = False,
    model: options.Model = None,
    offline: options.Offline = False,
) -> None:
    """Show the tokens of a text, one a line: id and piece.

    Example: realm tokenize "Hello world" --ids
    """
    from realm_jax import hub
    from realm_jax.tokenizer import Tokenizer

    if ids and count:
        raise RequestError("--ids and --count exclude each other; give one")
    text = read_text(text)
    tokenizer = Tokenizer.from_gguf(hub.resolve(model, offline=offline))
    tokens = tokenizer.encode(text, add_special=not no_special, parse_special=not no_special)
    if count:
        print(len(tokens))
    elif ids:
        print(json.dumps(tokens))
    else:
        for token in tokens:
            print(f"{token:7d}  {tokenizer.token_text(token)!r}")
