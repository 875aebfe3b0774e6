"""The house as a drawing, from the imports of its modules: a row for each floor, a line for each import.

Of the imports between units those are drawn that no other way leads to.
"""

import html
from collections.abc import Mapping

from test_floors import FLOOR_OF, imported, modules, unit_of

import realm_jax

WIDTH, ROW, BOX, GAP, MARGIN = 1180, 34, 26, 54, 96  # pixels
LETTER = 7.3
UNDRAWN = {"__main__", "serving"}
"""`python -m realm_jax`, and a package that imports nothing."""
TITLES = {
    6: "command line",
    5: "fronts",
    4: "engine",
    3: "scheduling, decoding",
    2: "the model",
    1: "parts",
    0: "facts, errors",
}


def units() -> dict[str, set[str]]:
    """Unit -> the units that it imports; only those that have a module."""
    files = {name: file for name, file in modules().items() if name not in UNDRAWN}
    found: dict[str, set[str]] = {unit_of(name): set() for name in files}
    for name, file in files.items():
        for target in imported(file.read_text(), name, file.name == "__init__.py"):
            first = target.split(".")[0]
            unit = unit_of(realm_jax._HOME.get(first, target))
            if unit in found and unit != unit_of(name):
                found[unit_of(name)].add(unit)
    return found


def direct(imports: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The imports without those that follow from others."""
    reached: dict[str, set[str]] = {}

    def reach(unit: str, above: frozenset[str]) -> set[str]:
        if unit not in reached:
            below = imports[unit] - above
            reached[unit] = below.union(*(reach(each, above | {unit}) for each in below))
        return reached[unit]

    for unit in imports:
        reach(unit, frozenset())
    return {
        unit: {each for each in below if not any(each in reached[other] for other in below - {each})}
        for unit, below in imports.items()
    }


def _rows(drawn: Mapping[str, set[str]]) -> list[tuple[int, list[str]]]:
    """(floor, units from left to right) from the top down; a floor has as many rows as it needs.

    Each row is ordered by where what imports its units stands, so that lines are short.
    """
    rows: list[tuple[int, list[str]]] = []
    place: dict[str, float] = {}
    for floor in sorted(set(FLOOR_OF.values()), reverse=True):
        here = [unit for unit in drawn if FLOOR_OF.get(unit) == floor]
        above = {u: [place[v] for v in drawn if v in place and u in drawn[v]] for u in here}
        here.sort(key=lambda u: (sum(above[u]) / len(above[u]) if above[u] else 0.5, u))
        count = -(-sum(_width(u) + 12 for u in here) // (WIDTH - MARGIN))
        for part in range(int(count)):
            row = here[part :: int(count)]  # every second one: both rows have the whole width
            place |= {unit: (i + 0.5) / len(row) for i, unit in enumerate(row)}
            rows.append((floor, row))
    return rows


def _width(unit: str) -> float:
    return len(unit.removeprefix("serving.")) * LETTER + 16


def svg() -> str:
    """The drawing."""
    imports = units()
    drawn, boxes, bands = direct(imports), dict[str, tuple[float, float]](), list[str]()
    y, before = 10.0, None
    for floor, row in _rows(drawn):
        y += 0 if before is None else (ROW + 6 if before == floor else ROW + GAP)
        if before != floor:
            title = html.escape(TITLES[floor])
            bands.append(
                f'<text class="floor" x="0" y="{y + 17:.0f}">{floor}  {title.partition(",")[0]}</text>'
            )
        room = WIDTH - MARGIN - sum(map(_width, row))
        x = MARGIN + room / (len(row) + 1)
        for unit in row:
            boxes[unit] = (x, y)
            x += _width(unit) + room / (len(row) + 1)
        before = floor
    lines = [_line(boxes, a, b) for a in drawn for b in sorted(drawn[a])]
    shown = [_box(unit, *boxes[unit], imports[unit]) for unit in boxes]
    style = (
        "text{font:12px ui-monospace,monospace;fill:#222}.floor{fill:#777;font-size:11px}"
        "rect{fill:#eef2fb;stroke:#5b74b5}.serving rect{fill:#fbf3e6;stroke:#b58a3c}"
        "path{fill:none;stroke:#8a8f9c;stroke-opacity:.55}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + ROW + 10:.0f}">'
        f'<style>{style}</style><rect width="100%" height="100%" style="fill:#fff;stroke:none"/>'
        + "\n".join([*bands, *lines, *shown])
        + "</svg>\n"
    )


def _line(boxes: Mapping[str, tuple[float, float]], a: str, b: str) -> str:
    """From the bottom of a to the top of b; beside each other, from below a to below b."""
    (x1, y1), (x2, y2) = boxes[a], boxes[b]
    x1, x2, y1 = x1 + _width(a) / 2, x2 + _width(b) / 2, y1 + BOX
    if y2 < y1:
        y2 += BOX
        bend = max(y1, y2) + 22
        return f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {bend:.0f} {x2:.0f} {bend:.0f} {x2:.0f} {y2:.0f}"/>'
    middle = (y1 + y2) / 2
    return f'<path d="M{x1:.0f} {y1:.0f}C{x1:.0f} {middle:.0f} {x2:.0f} {middle:.0f} {x2:.0f} {y2:.0f}"/>'


def _box(unit: str, x: float, y: float, below: set[str]) -> str:
    kind = ' class="serving"' if unit.startswith("serving.") else ""
    says = f"{unit} imports {', '.join(sorted(below)) or 'nothing of realm_jax'}"
    return (
        f"<g{kind}><title>{html.escape(says)}</title>"
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{_width(unit):.0f}" height="{BOX}" rx="4"/>'
        f'<text x="{x + 8:.0f}" y="{y + 17:.0f}">{html.escape(unit.removeprefix("serving."))}</text></g>'
    )
