"""Plots as files, drawn without a display."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from realm_jax.errors import RequestError, UnsupportedError


def check_plot(path: Path) -> None:
    """A plot can be written to the path. Raises UnsupportedError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise UnsupportedError("--plot needs matplotlib: pip install 'realm-jax[plot]'") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise RequestError(f"--plot is {str(path)!r}; its name must end with .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"--plot {path}: the folder does not exist")


@contextmanager
def axes(path: Path, **labels: str) -> Iterator[Any]:
    """Axes of matplotlib to draw on; at the end of the block the plot is in the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    found = figure.add_subplot(**labels)  # pyright: ignore[reportArgumentType, reportCallIssue]
    yield found
    found.grid(alpha=0.3)
    found.legend()
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise RequestError(f"--plot {path}: {error.strerror}") from error
