"""Pictures of the logit lens, attention and log-probabilities, drawn by matplotlib (extra `plot`)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from realm_jax.errors import RequestError, UnsupportedError
from realm_jax.llm import LLM
from realm_jax.research.activations import Forward
from realm_jax.research.lens import Lens, token_logprobs

FORMATS = (".png", ".svg", ".pdf")
DPI = 100
LONGEST, LARGEST = 400, 10_000  # inches, and square inches: 0.4 GB while it is drawn
LIGHT = 0.55
"""Cells darker than this have light text."""


@contextmanager
def figure(path: str | Path, width: float, height: float, **grid: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes to draw on; at the end of the block the picture is in the file.

    Raises UnsupportedError without matplotlib, RequestError for a file that cannot be written.
    """
    path = Path(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("pictures need matplotlib: pip install 'realm-jax[plot]'") from error
    if path.suffix not in FORMATS:
        raise RequestError(f"the picture is {str(path)!r}; its name must end with {', '.join(FORMATS)}")
    if max(width, height) > LONGEST or width * height > LARGEST:
        raise RequestError(
            f"the picture would have {width * DPI:,.0f} x {height * DPI:,.0f} pixels, which is too large; "
            "draw fewer tokens or heads"
        )
    drawn = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(drawn)
    yield drawn, drawn.subplots(**grid)
    try:
        drawn.savefig(path, dpi=DPI)
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error


def plot_lens(
    llm: LLM, found: Forward, lens: Lens, path: str | Path, *, row: int = 0, first: int = 0
) -> None:
    """The picture has each layer's best token after each token from `first` on, and its probability."""
    length = _length(found, row)
    if not 0 <= first < length:
        raise RequestError(f"first is {first}; give from 0 to {length - 1}")
    probabilities = np.exp(np.asarray(lens.logprobs[:, row, first:length, 0]))
    best = np.asarray(lens.ids[:, row, first:length, 0])
    L, T = best.shape
    with figure(path, 2.5 + 0.85 * T, 1.5 + 0.24 * L) as (drawn, axes):
        image = axes.imshow(probabilities, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
        for layer, t in np.ndindex(L, T):
            color = "white" if probabilities[layer, t] > LIGHT else "black"
            text = shown(llm, [int(best[layer, t])])[0]
            axes.text(t, layer, text, ha="center", va="center", fontsize=7, color=color, clip_on=True)
        _label(axes, "x", shown(llm, np.asarray(found.tokens[row, first:length])))
        axes.set(xlabel="after this token", ylabel="layer", title="What each layer would say next")
        drawn.colorbar(image, label="probability of the best token", fraction=0.03, pad=0.01)


def plot_attention(
    llm: LLM,
    found: Forward,
    layer: int,
    path: str | Path,
    *,
    row: int = 0,
    heads: Sequence[int] | None = None,
) -> None:
    """The picture has a map for each head of a layer: how much each token (down) takes of each (across)."""
    length = _length(found, row)
    weights = np.asarray(found[f"layers.{layer}.attention.weights"][row, :, :length, :length])
    chosen = list(range(len(weights))) if heads is None else list(heads)
    if not chosen or not all(0 <= head < len(weights) for head in chosen):
        raise RequestError(f"heads is {chosen}; give some of 0 to {len(weights) - 1}")
    columns = min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    side = max(2.2, 0.2 * length)
    texts = shown(llm, np.asarray(found.tokens[row, :length]))
    shape = {"nrows": rows, "ncols": columns, "squeeze": False, "sharex": True, "sharey": True}
    with figure(path, side * columns + 1, side * rows + 1, **shape) as (drawn, grid):
        for axes in grid.flat[len(chosen) :]:
            axes.set_visible(False)
        for axes, head in zip(grid.flat, chosen, strict=False):
            axes.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
            axes.set_title(f"head {head}", fontsize=9)
            _label(axes, "x", texts)
            _label(axes, "y", texts)
        drawn.suptitle(f"Attention of layer {layer}")


def plot_logprobs(llm: LLM, found: Forward, path: str | Path, *, row: int = 0) -> None:
    """The picture has each token's natural-log probability, given those before it."""
    length = _length(found, row)
    values = np.asarray(token_logprobs(found.logits, found.tokens))[row, : length - 1]
    with figure(path, 2 + 0.45 * length, 3.5) as (_, axes):
        axes.bar(np.arange(len(values)), values)
        _label(axes, "x", shown(llm, np.asarray(found.tokens[row, 1:length])))
        axes.set(ylabel="log-probability", title="How expected each token was")
        axes.grid(alpha=0.3, axis="y")


def _length(found: Forward, row: int) -> int:
    """The tokens of a sequence."""
    if not 0 <= row < len(found.lengths):
        raise RequestError(f"row is {row}; give from 0 to {len(found.lengths) - 1}")
    return int(found.lengths[row])


def shown(llm: LLM, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Each token as a picture shows it: spaces and line ends visible, and nothing that starts a formula."""
    texts = (llm.tokenizer.decode([int(i)], continues=True) for i in ids)
    marked = (text.replace(" ", "·").replace("\n", "↵").replace("$", r"\$") for text in texts)
    return ["".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) for text in marked]


def _label(axes: Any, side: str, texts: Sequence[str]) -> None:
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_ticks(range(len(texts)), texts, fontsize=7, rotation=60 if side == "x" else 0)
