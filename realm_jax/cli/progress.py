"""How far a command that writes tensors is."""

import sys
from collections.abc import Callable


def of_tensors(total: int, what: str = "writing") -> Callable[[str], None]:
    """Shows each tensor as it is begun: a bar on a terminal, else one line at the start."""
    from rich.console import Console
    from rich.progress import track

    if not sys.stderr.isatty():
        print(f"{what} {total} tensors", file=sys.stderr)
        return lambda _: None
    bar = iter(track(range(total), what, console=Console(stderr=True), transient=True))
    return lambda _: next(bar, None)  # pyright: ignore[reportReturnType]: what it gives is not used
