"""`realm convert`: models in other forms."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from realm_jax.cli import options, progress
from realm_jax.cli.flags import command
from realm_jax.cli.outputs import require_writable
from realm_jax.cli.tensor_types import NAMES, tensor_type

app = typer.Typer(
    help="Convert models: from folders of Hugging Face's form, to checkpoints of Orbax.",
    rich_markup_mode=None,
)


def hf(
    *,
    folder: Annotated[
        Path,
        typer.Argument(help="A model's folder: config.json, *.safetensors, tokenizer.json.", metavar="DIR"),
    ],
    target: Annotated[Path, typer.Argument(help="The GGUF file to write.", metavar="OUT.gguf")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help=f"The type of matrices, as realm quantize --pure makes it: {NAMES}; vectors are F32.  "
            "[default: the embedding's in DIR]",
            show_default=False,
            metavar="TYPE",
        ),
    ] = None,
) -> None:
    """Write a model of Hugging Face's form as a GGUF file: Llama, Mistral, Qwen2, Qwen3, Gemma 2, 3, Phi-3.

    Tensors are read and written one after another, so memory stays small. The tokenizer is compared with what
    the folder's own makes of a page of text; what GGUF cannot say exactly is refused, or told on stderr.

    Example: realm convert hf Qwen2.5-0.5B-Instruct qwen.gguf --type Q8_0
    """
    from realm_jax.convert import hf

    tensor_kind = tensor_type("--type", kind)
    require_writable(target, (path for path in folder.glob("*") if path.suffix != ".gguf"))
    model = hf.read(folder, tensor_kind)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    model.write(target, progress.of_tensors(len(model.planned)))
    print(target)


def orbax(
    *,
    reference: Annotated[
        str, typer.Argument(help="A GGUF path, a known name or hf:owner/repo/file.gguf.", metavar="REF")
    ],
    target: Annotated[Path, typer.Argument(help="The folder to make.", metavar="DIR")],
    dense: Annotated[
        Literal["bf16", "f32"] | None,
        typer.Option(
            "--dense",
            help="Expand packed tensors to these; it takes their memory.  [default: as they are]",
            show_default=False,
        ),
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Write a model as a folder: its tensors as arrays of an Orbax checkpoint, each with a checksum.

    Quantized tensors stay packed, bit for bit. Every command takes the folder where it takes a model. Until
    the folder is whole it has another name.

    Example: realm convert orbax smollm2-135m-instruct smollm2
    """
    from realm_jax import gguf, hub
    from realm_jax.convert.orbax import Checkpoint

    with gguf.open(hub.resolve(reference, offline=offline)) as file:
        Checkpoint(file, dense).write(target, progress.of_tensors(len(file.tensors)))
    print(target)


app.command("hf")(command(hf))
app.command("orbax")(command(orbax))
