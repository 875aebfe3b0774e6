"""`realm models`: the known models, and where their files are."""

from typing import Annotated

import typer

from realm_jax.cli import options
from realm_jax.cli.flags import command
from realm_jax.cli.text import size, table

app = typer.Typer(help="List, download and locate models.", rich_markup_mode=None)

Reference = Annotated[
    str | None,
    typer.Argument(
        help="A known name or hf:owner/repo/file.gguf.", metavar="REF", show_default="smollm2-135m-instruct"
    ),
]


@app.command("list")
@command
def list_models() -> None:
    """List the known models.

    Example: realm models list
    """
    from realm_jax import hub

    rows = [("NAME", "SIZE", "LICENCE", "LOCAL FILE")]
    for name, model in hub.known_models().items():
        marked = f"{name} (default)" if name == hub.DEFAULT_MODEL else name
        local = str(hub.cached_path(name) or "not downloaded")
        rows.append((marked, size(model.size), model.licence, local))
    print(table(rows))


@app.command("pull")
@command
def pull(*, reference: Reference = None, offline: options.Offline = False) -> None:
    """Download a model, if it is not here, and print its path.

    Example: realm models pull smollm2-135m-instruct
    """
    from realm_jax import hub

    print(hub.resolve(reference, offline=offline))


@app.command("path")
@command
def path(*, reference: Reference = None) -> None:
    """Print the local file of a model; an error if it is not downloaded.

    Example: realm models path
    """
    from realm_jax import hub

    print(hub.resolve(reference, offline=True))
