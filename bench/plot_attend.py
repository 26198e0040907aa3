"""Draws two pictures from the tables of an attention report: time against the kept share, bandwidth against bytes.

    python3 bench/plot_attend.py bench/results/attend-h100.md bench/results/attend-h100.svg

Left, 8 sequences of 32768 positions, six slots: attend() over lists, over everything without one, and a bare gather of
the same rows. Right, every cell of the verify table: bytes that a pass must read, and how fast it reads them.
"""

import math
import pathlib
import re
import sys

from plot_select import FONT, GRID, HEIGHT, INK, LEFT, TOP, WIDTH, polyline, tables, text_at

GAP = 90
OURS, DENSE, BARE = "#d55e00", "#0072b2", "#7f7f7f"


def number(cell):
    return float(cell.split()[0])


def read_report(text):
    """(points by kept share, points by megabytes, copy bandwidth in GB/s)"""
    shares, sizes = [], []
    for _, names, lines in tables(text):
        for line in lines:
            cells = dict(zip(names, line))
            if names[:2] == ["varied", ""] and cells["varied"] == "kept share":
                gather = number(cells["bare gather us"])
                shares.append((number(cells["kept"]), number(cells["sparse us"]), number(cells["dense us"]), gather))
            if names[:4] == ["batch", "kv_len", "", "us"] and "fp8" not in cells[""] and "rec" not in cells[""]:
                megabytes, us, gather = number(cells["MB"]), number(cells["us"]), cells["bare gather us"]
                bare = megabytes * 1e3 / number(gather) if gather != "-" else None
                sizes.append((megabytes, megabytes * 1e3 / us, bare, cells[""].startswith("dense")))
    return sorted(shares), sorted(sizes, key=lambda size: size[0]), float(re.search(r"copy: (\d+) GB/s", text)[1])


def frame(left, title, across, x_marks, y_marks):
    """Grid and names; marks are (place from 0 to 1, words)."""
    out = []
    for at, words in x_marks:
        x = left + WIDTH * at
        out.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="{GRID}"/>')
        out.append(text_at(x, TOP + HEIGHT + 18, words))
    for at, words in y_marks:
        y = TOP + HEIGHT * (1 - at)
        out.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="{GRID}"/>')
        out.append(text_at(left - 8, y + 4.5, words, "end"))
    out.append(f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="{INK}"/>')
    out.append(text_at(left + WIDTH / 2, TOP - 10, title))
    out.append(text_at(left + WIDTH / 2, TOP + HEIGHT + 40, across))
    return out


def marked(points, colour):
    return [f'<circle r="3.2" cx="{x:.1f}" cy="{y:.1f}" fill="{colour}"/>' for x, y in points]


def legend(left, entries):
    """In the lower right corner, where neither picture has lines."""
    out, x = [], left + WIDTH - 208
    for i, (name, colour, dash) in enumerate(entries):
        y = TOP + HEIGHT - 20 * (len(entries) - i)
        out.append(polyline([(x, y), (x + 26, y)], colour, 2.5, dash))
        out.append(text_at(x + 34, y + 4.5, name, "start"))
    return out


def step_for(highest):
    return next(step for step in (10, 20, 25, 50, 100, 200, 250, 500, 1000) if highest / step <= 8)


def draw_shares(left, shares):
    highest = 1.05 * max(max(sparse, dense) for _, sparse, dense, _ in shares)
    step = step_for(highest)

    def place(kept, us):
        return left + WIDTH * kept / 100, TOP + HEIGHT * (1 - us / highest)

    ticks = [(us / highest, us) for us in range(0, int(highest) + 1, step)]
    out = frame(left, "8 x 32768, six slots: us", "kept share, %", [(p / 100, p) for p in range(0, 101, 20)], ticks)
    dense = sorted(dense for _, _, dense, _ in shares)[len(shares) // 2]
    out.append(polyline([place(0, dense), place(100, dense)], DENSE, 2, "6 4"))
    gather = [place(kept, bare) for kept, _, _, bare in shares]
    ours = [place(kept, sparse) for kept, sparse, _, _ in shares]
    out += [polyline(gather, BARE, 2, "2 3"), polyline(ours, OURS, 3, ""), *marked(ours, OURS)]
    names = [("attend() over lists", OURS, ""), ("attend(), dense", DENSE, "6 4"), ("bare gather of the rows", BARE, "2 3")]
    return out + legend(left, names)


def draw_sizes(left, sizes, copy):
    low, high = math.floor(math.log10(sizes[0][0])), math.ceil(math.log10(sizes[-1][0]))
    highest = 1.12 * max(copy, max(rate for _, rate, _, _ in sizes))

    def place(megabytes, rate):
        x = left + WIDTH * (math.log10(megabytes) - low) / (high - low)
        return x, TOP + HEIGHT * (1 - rate / highest)

    powers = [((power - low) / (high - low), f"{10**power:g}") for power in range(low, high + 1)]
    ticks = [(rate / highest, rate) for rate in range(0, int(highest) + 1, 500)]
    out = frame(left, "the verify table: GB/s", "MB that a pass must read", powers, ticks)
    out.append(polyline([place(10.0**low, copy), place(10.0**high, copy)], INK, 1.5, "2 3"))
    out += marked([place(megabytes, bare) for megabytes, _, bare, _ in sizes if bare], BARE)
    out += marked([place(megabytes, rate) for megabytes, rate, _, dense in sizes if not dense], OURS)
    out += marked([place(megabytes, rate) for megabytes, rate, _, dense in sizes if dense], DENSE)
    names = [("lists", OURS, ""), ("dense", DENSE, ""), ("bare gather", BARE, ""), ("device copy", INK, "2 3")]
    return out + legend(left, names)


def draw(shares, sizes, copy):
    width, height = LEFT + 2 * WIDTH + GAP + 24, TOP + HEIGHT + 58
    title = "attend(): 32 query heads, 8 kv heads, head_dim 128, bf16"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" {FONT}>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            text_at(LEFT, 26, title, "start", 'font-size="16" font-weight="bold"'),
            *draw_shares(LEFT, shares),
            *draw_sizes(LEFT + WIDTH + GAP, sizes, copy),
            "</svg>\n",
        ]
    )


def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} REPORT.md PICTURE.svg")
    found = read_report(pathlib.Path(sys.argv[1]).read_text(encoding="utf-8"))
    pathlib.Path(sys.argv[2]).write_text(draw(*found), encoding="utf-8")


if __name__ == "__main__":
    main()
