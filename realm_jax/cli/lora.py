"""`realm lora`: adapters."""

import typer

from realm_jax.cli.flags import command
from realm_jax.cli.lora_train import train

app = typer.Typer(help="Train adapters (LoRA).", rich_markup_mode=None)
app.command("train")(command(train))
