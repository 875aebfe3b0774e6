"""`realm serve`: models over HTTP, as OpenAI's API."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realm_jax.cli import options, serve_keys
from realm_jax.cli.flags import command
from realm_jax.errors import RequestError, UnsupportedError

if TYPE_CHECKING:
    from realm_jax.serving.serve_config import ServeConfig
    from realm_jax.serving.server.tenancy import Tenancy

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(serve_keys.app, name="keys")


@app.callback()
@command
def serve(
    *,
    context: typer.Context,
    add_model: Annotated[
        list[str] | None,
        typer.Option(
            "--add-model",
            help="Serve this model, too, loaded when it is first asked for; repeatable.",
            metavar="NAME=REF",
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Where to listen.", metavar="HOST")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="0 = any that is free.", metavar="N", min=0, max=65535)
    ] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            help="What requests call the model of -m; repeatable, the first is shown.  [default: its name]",
            metavar="NAME",
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen where others can reach it, without keys.")
    ] = False,
    serve_config: Annotated[
        Path | None,
        typer.Option(
            "--serve-config",
            "--tenants",
            help="A TOML file of models, and of tenants and their limits.",
            metavar="FILE",
        ),
    ] = None,
    idle_unload: Annotated[
        float | None,
        typer.Option(
            "--idle-unload", help="Unload a model that nobody used for so many seconds.", metavar="X", min=1
        ),
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
        typer.Option(
            "--warmup", help="Compile everything while a model loads, so that no request waits for that."
        ),
    ] = False,
    max_num_seqs: options.MaxNumSeqs = 16,
    max_queue: Annotated[
        int, typer.Option("--max-queue", help="Sequences that may wait; more are refused.", metavar="N")
    ] = 256,
    max_loras: options.MaxLoras = 8,
    max_lora_rank: options.MaxLoraRank = None,
    engine: options.EngineFlags,
) -> None:
    """Serve models over HTTP: /v1/chat/completions, /v1/completions, /v1/models and others.

    The address is printed when requests are served; the log is JSON on stderr. Ctrl-C lets running requests
    end; a second one does not. Adapters of --lora NAME=PATH are chosen by `model`.

    Several models (--add-model, or [[models]] in the file) are loaded when they are first asked for; those
    used longest ago leave where --memory needs it.

    As soon as a key was made (realm serve keys create --tenant NAME), everything but /health needs one.

    Example: realm serve -m model.gguf --port 8000
    Example: realm serve -m small.gguf --add-model big=big.gguf --memory 8G
    """
    if context.invoked_subcommand is not None:
        return
    try:
        from realm_jax.serving.server.logs import start_logging
        from realm_jax.serving.server.process import RealmServer, Settings
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"realm serve needs {error.name}: pip install 'realm-jax[server]'") from error

    from realm_jax.cli.serve_models import served_models

    file = _read(serve_config)
    config: dict[str, Any] = {
        "max_num_seqs": max_num_seqs,
        "max_queue": max_queue,
        "max_loras": max_loras,
        "max_lora_rank": max_lora_rank,
    }
    models = served_models(engine, config, add_model or (), file.models, served_model_name, warmup=warmup)
    settings = Settings(
        host,
        port,
        insecure,
        drain_timeout,
        log_prompts,
        tenancy=_tenancy(file, keys_file),
        adapter_folder=_folder(lora_dir),
        memory=options.memory_bytes(engine.memory) or file.memory,
        idle_seconds=idle_unload or file.idle_unload,
    )
    start_logging()

    def ready(address: str) -> None:
        print(address, flush=True)

    server = RealmServer(settings, models, ready)
    if not server.run_to_end():  # it was still loading, which nothing can interrupt
        sys.stderr.flush()
        os._exit(0)


def _read(path: Path | None) -> "ServeConfig":
    from realm_jax.serving.serve_config import ServeConfig, read_serve_config

    return ServeConfig({}) if path is None else read_serve_config(path)


def _tenancy(config: "ServeConfig", keys: Path | None) -> "Tenancy":
    """Who may ask. The file of keys is made if it is missing, so that keys made later count at once."""
    from realm_jax.serving.keys import KeyStore
    from realm_jax.serving.server.tenancy import Tenancy

    return Tenancy(KeyStore(keys or config.keys or serve_keys.default_keys()), config.tenants)


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise RequestError(f"--lora-dir is {path}, which is no folder")
    return path
