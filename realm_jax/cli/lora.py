"""`realm lora`: adapters as files. Each command is in a file of its own."""

import typer

from realm_jax.cli import lora_convert, lora_inspect, lora_merge, lora_train
from realm_jax.cli.flags import command

app = typer.Typer(
    help="Train LoRA adapters, look at them, convert them, fold them into models.", rich_markup_mode=None
)
app.command("train")(command(lora_train.train))
app.command("inspect")(command(lora_inspect.inspect))
app.command("convert")(command(lora_convert.convert))
app.command("merge")(command(lora_merge.merge))
