"""A model file written anew: its tensors one after another, in their order, each from the one of its name."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from realm_jax.ggml import GGMLType
from realm_jax.gguf import GGUFFile, TensorInfo, writer

Progress = Callable[[str], None]
"""Called with a tensor's name when it is begun."""


def rewrite(
    file: GGUFFile,
    path: Path,
    metadata: Mapping[str, bytes],
    types: Mapping[str, GGMLType],
    chunks: Callable[[TensorInfo, GGMLType], Iterable[writer.Chunk]],
    progress: Progress | None,
) -> None:
    """`path` holds this metadata, and each tensor of the file as `chunks` makes it of its type in `types`.

    Of the file no more than one tensor is in memory. Raises ModelFileError if `path` cannot be written.
    """

    def tensors() -> Iterator[Iterable[writer.Chunk]]:
        for info in file.tensors.values():
            if progress is not None:
                progress(info.name)
            yield chunks(info, types[info.name])
            file.release(info.name)

    plans = [writer.TensorPlan(info.name, info.shape, types[info.name]) for info in file.tensors.values()]
    writer.write(path, metadata, plans, tensors(), alignment=file.metadata.get("general.alignment", 32))
