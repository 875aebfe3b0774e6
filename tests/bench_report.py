"""bench_cpu's rows as a person reads them: lines, Markdown, a plot."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def row_line(row: Row) -> str:
    """One line as the run goes."""
    if "parts" in row:
        return f"{row['model']} {_call(row)}: {row['milliseconds']:.2f} ms"
    ratio = f", {row['ratio']:.2f}x" if "ratio" in row else ""
    sides = ", ".join(f"{row[side]:g} {side}" for side in ("realm_jax", "llama_cpp") if side in row)
    return f"{row['model']} {_name(row)}: {sides} {row['unit']}{ratio}"


def markdown(rows: list[Row]) -> str:
    """A table: a line a test, a column a model; ours, and how many times as good as llama.cpp that is."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    cells = {(_name(row), row["model"]): _cell(row) for row in rows}
    lines = [["", *models], ["---", *("---:" for _ in models)]]
    for name in dict.fromkeys(name for name, _ in cells):
        lines.append([name, *(cells.get((name, model), "") for model in models)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def profile_table(rows: list[Row]) -> str:
    """A line a call, a column a part: milliseconds, and the part's share."""
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    lines = [["call", "ms", *parts], ["---", *("---:" for _ in range(len(parts) + 1))]]
    for row in rows:
        whole = row["milliseconds"]
        shares = (row["parts"].get(part, 0.0) for part in parts)
        cells = (f"{ms:.2f} ({ms / whole:.0%})" for ms in shares)
        lines.append([f"{row['model']} {_call(row)}", f"{whole:.2f}", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def check_plot(path: Path) -> None:
    """A plot can be drawn and written there, or the process ends."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("error: --plot needs matplotlib: pip install 'realm-jax[plot]'")
    if path.suffix not in (".png", ".svg", ".pdf"):
        sys.exit(f"error: --plot is {str(path)!r}; its name must end with .png, .svg or .pdf")
    if not path.absolute().parent.is_dir():
        sys.exit(f"error: --plot {path}: the folder does not exist")


def draw(rows: list[Row], path: Path) -> None:
    """A panel a model: decode speed against the number of sequences, for both sides and each depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["test"] == "decode"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    if not models:
        sys.exit("error: --plot draws decode rows; there are none (see --tests)")
    columns = min(len(models), 4)
    lines = -(-len(models) // columns)
    figure = Figure(figsize=(1 + 3.5 * columns, 3.5 * lines), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    for place, model in enumerate(models, 1):
        axes = figure.add_subplot(lines, columns, place, title=model)
        axes.set(xlabel="sequences at once", ylabel="tokens a second, in total")
        mine = [row for row in rows if row["model"] == model]
        for number, depth in enumerate(dict.fromkeys(row["depth"] for row in mine)):
            style = ("-", "--", ":", "-.")[number % 4]
            some = [row for row in mine if row["depth"] == depth]
            for side, color in (("realm_jax", "tab:blue"), ("llama_cpp", "tab:orange")):
                if side in some[0]:
                    at, speed = [row["sequences"] for row in some], [row[side] for row in some]
                    axes.plot(at, speed, style, color=color, marker="o", label=f"{side}, after {depth}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _name(row: Row) -> str:
    match row["test"]:
        case "prefill":
            return f"prefill {row['tokens']:,}, tokens/s"
        case "decode":
            return f"decode, {row['sequences']} after {row['depth']:,}, tokens/s"
        case "ttft":
            return f"first token after {row['tokens']}, ms"
        case "load":
            return "load, MB/s"
        case _ if row["unit"] == "MB":
            return f"process, {row['tokens']} tokens, peak MB"
        case _:
            return f"process, {row['tokens']} tokens, s"


def _call(row: Row) -> str:
    if row["call"] == "prefill":
        return f"prefill {row['tokens']:,}"
    return f"decode, {row['sequences']} after {row['depth']:,}"


def _cell(row: Row) -> str:
    figure = f"{row['realm_jax']:,.0f}" if row["realm_jax"] >= 100 else f"{row['realm_jax']:.3g}"
    return f"{figure} ({row['ratio']:.2f}x)" if "ratio" in row else figure
