"""The command `realm`: results on stdout, all else on stderr; exit 0 ok, 1 failed, 2 usage."""

import os
import sys
from typing import NoReturn

import typer

from realm_jax import __version__
from realm_jax.cli import chat, doctor, generate, inspect, models, tokenize
from realm_jax.errors import RealmError, RequestError

app = typer.Typer(
    name="realm",
    help="Run GGUF language models, compiled by JAX.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("tokenize")(tokenize.tokenize)
app.command("inspect")(inspect.inspect)
app.command("doctor")(doctor.doctor)
app.add_typer(models.app, name="models")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"realm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Run GGUF language models, compiled by JAX."""
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def main() -> NoReturn:
    """Run a command line; a user's error is one line and no traceback, unless --verbose."""
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        code = _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # whoever read stdout has left; without this, flushing at exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except RealmError as error:
        if os.environ.get("REALM_VERBOSE"):
            raise
        code = _fail(str(error), 2 if isinstance(error, RequestError) else 1)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code
