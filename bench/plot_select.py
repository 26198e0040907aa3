"""Draws time against length from the tables of a selection report: ours, each peer's, and reading the rows once.

    python3 bench/plot_select.py bench/results/select-h100.md bench/results/select-h100.svg

Two panels, 8 rows and 256 rows, softmax-like weights, cold. Peers that are told how many positions to keep are dashed.
"""

import math
import pathlib
import sys

PANELS = (8, 256)
WIDTH, HEIGHT, TOP, LEFT, GAP = 400, 380, 64, 62, 76
FONT = 'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="13"'
INK, GRID = "#1f2933", "#dfe3e8"
COLOURS = {
    "select()": "#d55e00",
    "FlashInfer top-p": "#0072b2",
    "FlashInfer AIR top-p": "#56b4e9",
    "CUB segmented sort": "#009e73",
    "CUB segmented radix sort": "#8fbf3f",
    "torch sort": "#cc79a7",
    "FlashInfer radix top-k": "#7f7f7f",
    "FlashInfer filtered top-k": "#b0a030",
}


def tables(text):
    """Every table as (line above it, column names, rows)."""
    above, table = "", None
    for line in text.splitlines() + [""]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            if table:
                yield table
            table = None
            above = line or above
        elif table is None:
            table = (above, cells, [])
        elif not line.startswith("|---"):
            table[2].append(cells)


def read_series(text):
    """{rows: {name: [(length, us)]}} of the softmax-like weights, cold."""
    found = {rows: {} for rows in PANELS}
    for above, names, lines in tables(text):
        torch = "torch sort, cold us" in names
        if names[0] != "weights" or not (torch or above.endswith("cold, us")):
            continue
        for line in lines:
            cells = dict(zip(names, line))
            rows = int(cells["rows"])
            if cells["weights"] != "softmax" or rows not in found:
                continue
            for name in ["torch sort, cold us"] if torch else ["read once", "select()", *names[6:-1]]:
                try:
                    point = (int(cells["length"]), float(cells[name].rstrip("†")))
                except ValueError:
                    continue  # no figure for this size
                points = found[rows].setdefault(name.removesuffix(", cold us"), [])
                if point[0] not in [length for length, _ in points]:
                    points.append(point)
    # The table rounds to 0.1 us, too coarse for the line: it goes through the longest row's figure.
    for series in found.values():
        length, limit = max(series["read once"])
        series["read once"] = [(n, limit * n / length) for n, _ in series["read once"]]
    return found


def text_at(x, y, words, anchor="middle", more=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}" {more}>{words}</text>'


def polyline(points, colour, width, dash):
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline fill="none" stroke="{colour}" stroke-width="{width}"{style} points="{joined}"/>'


def style_of(name):
    if name == "read once":
        return INK, 1.5, "2 3"
    return COLOURS.get(name, INK), 3 if name == "select()" else 2, "6 4" if "top-k" in name else ""


def draw_panel(left, rows, series, low, high):
    lengths = sorted({length for points in series.values() for length, _ in points})
    first, last = math.log(lengths[0]), math.log(lengths[-1])

    def place(length, us):
        x = left + WIDTH * (math.log(length) - first) / (last - first)
        return x, TOP + HEIGHT * (1 - (math.log10(us) - low) / (high - low))

    out = []
    for length in lengths:
        x = place(length, 10.0**low)[0]
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="{GRID}"/>')
        out.append(text_at(x, TOP + HEIGHT + 18, length))
    for power in range(low, high + 1):
        y = place(lengths[0], 10.0**power)[1]
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="{GRID}"/>')
        out.append(text_at(left - 8, y + 4.5, f"{10.0**power:g}", "end"))
    out.append(f'<clipPath id="rows{rows}"><rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}"/></clipPath>')
    out.append(f'<g clip-path="url(#rows{rows})">')
    for name, points in series.items():
        colour, width, dash = style_of(name)
        placed = [place(*point) for point in points]
        out.append(polyline(placed, colour, width, dash))
        if name != "read once":
            out.extend(f'<circle r="3.2" cx="{x:.1f}" cy="{y:.1f}" fill="{colour}"/>' for x, y in placed)
    out.append("</g>")
    out.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="{INK}"/>')
    out.append(text_at(left + WIDTH / 2, TOP - 10, f"{rows} rows"))
    out.append(text_at(left + WIDTH / 2, TOP + HEIGHT + 40, "positions in a row"))
    return out


def draw(found):
    names = list(dict.fromkeys(name for series in found.values() for name in series if name != "read once"))
    names.append("read once")
    longest = max(us for series in found.values() for points in series.values() for _, us in points)
    low, high = -1, math.ceil(math.log10(longest))
    legend = LEFT + len(PANELS) * (WIDTH + GAP)
    total, height = legend + 250, TOP + HEIGHT + 58
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" height="{height}" {FONT}>',
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        text_at(
            LEFT, 26, "Selecting 95 % of each row's mass: time by length", "start", 'font-size="16" font-weight="bold"'
        ),
        text_at(18, TOP + HEIGHT / 2, "us, cold", more=f'transform="rotate(-90 18 {TOP + HEIGHT / 2})"'),
    ]
    for i, rows in enumerate(PANELS):
        out += draw_panel(LEFT + i * (WIDTH + GAP), rows, found[rows], low, high)
    for i, name in enumerate(names):
        y = TOP + 12 + 24 * i
        colour, width, dash = style_of(name)
        out.append(polyline([(legend - 20, y), (legend + 10, y)], colour, width, dash))
        out.append(text_at(legend + 18, y + 4.5, name + (" (k given)" if "top-k" in name else ""), "start"))
    return "\n".join([*out, "</svg>"]) + "\n"


def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} REPORT.md PICTURE.svg")
    found = read_series(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    pathlib.Path(sys.argv[2]).write_text(draw(found), encoding="utf-8")


if __name__ == "__main__":
    main()
