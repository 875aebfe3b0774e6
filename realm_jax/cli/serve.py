"""`realm serve`: the model over HTTP, as OpenAI's API."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realm_jax.cli import options, serve_keys
from realm_jax.cli.flags import command
from realm_jax.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from realm_jax.llm import LLM
    from realm_jax.serving.server.tenancy import Tenancy


app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(serve_keys.app, name="keys")


@app.callback()
@command
def serve(
    *,
    context: typer.Context,
    host: Annotated[str, typer.Option("--host", help="Where to listen.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="0 = any that is free.", metavar="N", min=0, max=65535)
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            help="What requests call the model; repeatable, the first is shown.  [default: the model's name]",
            metavar="NAME",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen where others can reach it, without keys.")
    ] = False,
    tenants: Annotated[
        Path | None,
        typer.Option("--tenants", help="A TOML file of tenants and their limits.", metavar="FILE"),
    ] = None,
    keys_file: serve_keys.Keys = None,
    lora_dir: Annotated[
        Path | None,
        typer.Option(
            "--lora-dir", help="Adapters in this folder may be loaded over HTTP, by admins.", metavar="DIR"
        ),
    ] = None,
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout", help="Seconds that requests may still run after Ctrl-C.", metavar="X", min=0
        ),
    ] = 30.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log, too.")
    ] = False,
    warmup: Annotated[
        bool,
        typer.Option("--warmup", help="Compile everything first, so that no request waits for that."),
    ] = False,
    max_num_seqs: options.MaxNumSeqs = 16,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Sequences that may wait; more are refused.", metavar="N")
    ] = 256,
    max_loras: options.MaxLoras = 8,
    max_lora_rank: options.MaxLoraRank = None,
    engine: options.EngineFlags,
) -> None:
    """Serve the model over HTTP: /v1/chat/completions, /v1/completions, /v1/models and others.

    The address is printed when requests are served; the log is JSON on stderr. Ctrl-C lets running requests
    end; a second one does not. Adapters of --lora NAME=PATH are chosen by `model`.

    As soon as a key was made (realm serve keys create --tenant NAME), everything but /health needs one.

    Example: realm serve -m model.gguf --port 8000
    """
    if context.invoked_subcommand is not None:
        return
    try:
        from realm_jax.serving.server.logs import start_logging
        from realm_jax.serving.server.process import RealmServer, Settings
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"realm serve needs {error.name}: pip install 'realm-jax[server]'") from error

    names = tuple(served_model_name or [_name_of(engine.model)])
    settings = Settings(
        names,
        host,
        port,
        insecure,
        drain_timeout,
        log_prompts,
        tenancy=_tenancy(tenants, keys_file),
        adapter_folder=_folder(lora_dir),
    )
    start_logging()
    config: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_queue": max_queue,
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank,
    }

    def ready(address: str) -> None:
        print(address, flush=True)

    server = RealmServer(settings, lambda: _load(engine, names, config, warmup), ready)
    if not server.run_to_end():  # it was still loading, which nothing can interrupt
        sys.stderr.flush()
        os._exit(0)


def _tenancy(tenants: Path | None, keys: Path | None) -> "Tenancy":
    """Who may ask. The file of keys is made if it is missing, so that keys made later count at once."""
    from realm_jax.serving.keys import KeyStore
    from realm_jax.serving.serve_config import read_serve_config
    from realm_jax.serving.server.tenancy import Tenancy

    config = None if tenants is None else read_serve_config(tenants)
    named = keys or (None if config is None else config.keys)
    return Tenancy(KeyStore(named or serve_keys.default_keys()), None if config is None else config.tenants)


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise RequestError(f"--lora-dir is {path}, which is no folder")
    return path


def _load(engine: options.EngineFlags, names: tuple[str, ...], config: dict[str, Any], warmup: bool) -> "LLM":
    """The model, ready to serve; on the engine's thread."""
    from realm_jax.cli.session import open_model
    from realm_jax.serving.server.logs import LoggedProgress, event

    llm = open_model(engine, LoggedProgress(), names_adapters=True, **config)
    if taken := sorted(set(names) & llm.engine.adapters.named.keys()):
        raise RequestError(f"--lora {taken[0]}=...: the model has this name; choose another")
    if warmup:
        event("warmed up", programs=llm.engine.warmup())
    return llm


def _name_of(reference: str | None) -> str:
    """What a model is called: a file without its folders and ending, a reference as it is."""
    from realm_jax.hub.references import DEFAULT_MODEL

    path = Path(reference or DEFAULT_MODEL)
    return path.stem if path.suffix == ".gguf" and ":" not in str(path) else str(path)
