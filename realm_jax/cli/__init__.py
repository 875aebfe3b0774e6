"""The command `realm`: results on stdout, all else on stderr; exit 0 ok, 1 failed, 2 usage."""

import gc
import io
import os
import sys
import traceback
from typing import Any, NoReturn, TextIO

import typer

from realm_jax import __version__
from realm_jax.cli import (
    batch,
    bench,
    chat,
    convert,
    doctor,
    generate,
    imatrix,
    inspect,
    interrupts,
    lora,
    models,
    perplexity,
    quantize,
    score,
    serve,
    tokenize,
)
from realm_jax.cli import eval as evaluation
from realm_jax.cli.flags import Run, command
from realm_jax.cli.interrupts import INTERRUPTED
from realm_jax.errors import RealmError, RequestError

app = typer.Typer(
    name="realm",
    help="Run GGUF language models, compiled by JAX.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: narrower than boxes, and it keeps every word
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(command(generate.generate))
app.command("chat")(command(chat.chat))
app.command("tokenize")(command(tokenize.tokenize))
app.command("batch")(command(batch.batch))
app.command("perplexity")(command(perplexity.perplexity))
app.command("score")(command(score.score))
app.command("eval", context_settings={"ignore_unknown_options": True})(command(evaluation.evaluate))
app.command("bench")(command(bench.bench))
app.command("quantize")(command(quantize.quantize))
app.command("imatrix")(command(imatrix.imatrix))
app.command("inspect")(command(inspect.inspect))
app.command("doctor")(command(doctor.doctor))
app.add_typer(models.app, name="models")
app.add_typer(lora.app, name="lora")
app.add_typer(convert.app, name="convert")
app.add_typer(serve.app, name="serve")


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"realm {__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Run GGUF language models, compiled by JAX.

    Example: realm generate "What is the capital of France?" --temperature 0
    """


def main() -> NoReturn:
    """Run a command line; a user's error is one line and no traceback, unless --verbose."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal cannot show
    run = Run()
    errors = sys.stderr  # also where another process shows all else
    try:
        with interrupts.repeated_where_lost():
            code = app(standalone_mode=False, obj=run, prog_name="realm")
        sys.stdout.flush()
    except typer.TyperException as error:
        code = _fail(_usage(error), 2, errors)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except BrokenPipeError:
        # whoever read stdout has left; without this, flushing at exit would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except RealmError as error:
        if run.verbose:
            traceback.print_exc(file=errors)
        code = _fail(str(error), 2 if isinstance(error, RequestError) else 1, errors)
    if code == INTERRUPTED:
        interrupts.leave()
    gc.freeze()  # the process ends: what it holds need not be searched for garbage, which takes 0.3 s
    sys.exit(code)


def _usage(error: Any) -> str:
    """The parser's words, the value that it refused, where that came from, and where to look."""
    message = error.format_message().rstrip(".")
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if hasattr(error.__cause__, "errors"):  # pydantic's, which does not name the value
        message = message.replace(": Value error, ", ": ")
        value = repr(error.__cause__.errors()[0]["input"])
        message += "" if value in message else f", not {value}"
    if context is not None and parameter is not None:
        source = context.get_parameter_source(parameter.name)
        origins = {"ENVIRONMENT": f" (from {parameter.envvar})", "DEFAULT_MAP": " (from --config)"}
        message += origins.get(source.name, "") if source else ""
    return message if context is None else f"{message}; see {context.command_path} --help"


def _fail(message: str, code: int, errors: TextIO) -> int:
    print("error: " + " ".join(message.split()), file=errors)
    return code
