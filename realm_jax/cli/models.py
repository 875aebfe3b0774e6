"""`realm models`: the known models, and where their files are."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from realm_jax.cli import options

app = typer.Typer(help="List, download and locate models.", no_args_is_help=False)

Reference = Annotated[
    str | None,
    typer.Argument(
        help="A known name or hf:owner/repo/file.gguf [default: the default model].", metavar="REF"
    ),
]


@app.command("list")
def list_models() -> None:
    """List the known models.

    Example: realm models list
    """
    from realm_jax import hub

    table = Table("name", "size", "licence", "local file")
    for name, model in hub.known_models().items():
        path = hub.cached_path(name)
        marked = f"{name} (default)" if name == hub.DEFAULT_MODEL else name
        table.add_row(marked, f"{model.size / 1e6:,.0f} MB", model.licence, str(path or "not downloaded"))
    Console(soft_wrap=True).print(table)


@app.command("pull")
def pull(reference: Reference = None, offline: options.Offline = False) -> None:
    """Download a model, if it is not here, and print its path.

    Example: realm models pull smollm2-135m-instruct
    """
    from realm_jax import hub

    print(hub.resolve(reference, offline=offline))


@app.command("path")
def path(reference: Reference = None) -> None:
    """Print the local file of a model; an error if it is not downloaded.

    Example: realm models path
    """
    from realm_jax import hub

    print(hub.resolve(reference, offline=True))
