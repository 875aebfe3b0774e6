"""Text from the command line, a file or stdin; sizes for a person."""

import sys
from collections.abc import Iterable
from pathlib import Path

from realm_jax.errors import RequestError


def read_text(source: str | Path, flag: str = "--file") -> str:
    """The text that an argument is, or the contents of the file that a path names; - is stdin.

    flag: which the path was given to.
    """
    try:
        if str(source) == "-":
            return sys.stdin.read()
        if isinstance(source, Path):
            return source.read_text("utf-8")
        source.encode()  # a terminal may hand over bytes that are no text
    except OSError as error:
        raise RequestError(f"{flag} {source}: {error.strerror}") from error
    except UnicodeError as error:
        name = {"-": "stdin"}.get(str(source), f"{flag} {source}" if isinstance(source, Path) else "the text")
        raise RequestError(f"{name} is not UTF-8: {error}") from error
    return source


def table(rows: Iterable[Iterable[str]]) -> str:
    """Columns two spaces apart. Nothing is cut or wrapped: a path must stay one that can be copied."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = (zip(row, widths, strict=True) for row in cells)
    return "\n".join("  ".join(text.ljust(width) for text, width in row).rstrip() for row in padded)


def size(nbytes: int) -> str:
    """Bytes in the largest unit that leaves a digit before the point."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:,.1f} {name}"
    return f"{nbytes} B"
