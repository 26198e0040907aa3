"""Draws decode_bench's cells: speed against context, and where a round's time goes.

    python3 bench/plot_decode.py bench/results/decode-h100.jsonl bench/results/decode-h100

writes decode-h100-speed.svg and decode-h100-phases.svg. Tokens a second at an acceptance of 0.8, each way at its own best
draft length; phases at four drafted tokens. 22 % kept.
"""

import json
import math
import pathlib
import sys

ACCEPTANCE, KEPT, DRAFTS = 0.8, 0.22, 4
FONT = 'font-family="Helvetica, Arial, \'DejaVu Sans\', sans-serif" font-size="13"'
INK, GRID = "#1f2933", "#dfe3e8"
WAYS = {
    "autoregressive": "#7f7f7f",
    "dense speculation": "#0072b2",
    "sparse draft, dense verify": "#56b4e9",
    "SpecAttn": "#d55e00",
    "SpecAttn, every 4th round": "#cc79a7",
}
PHASES = {
    "draft_ms": ("draft", "#56b4e9"),
    "guide_ms": ("importance and selection", "#009e73"),
    "verify_ms": ("verify", "#d55e00"),
    "rest": ("acceptance, host", "#7f7f7f"),
}
PHASE_WAYS = ("dense speculation", "SpecAttn", "SpecAttn, every 4th round")
PANELS = (("Llama-3.1-8B", 8), ("Llama-3.1-8B", 1), ("Llama-2-7B", 1))
GOALS = (
    ("Llama-2-7B", 2048, 1),
    ("Llama-2-7B", 8192, 1),
    ("Llama-2-7B", 32768, 1),
    ("Llama-2-7B", 8192, 8),
    ("Llama-3.1-8B", 32768, 8),
    ("Llama-3.1-8B", 131072, 1),
)


def text(x, y, words, anchor="middle", colour=INK, turn=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"{turn}>{words}</text>'


def line(x1, y1, x2, y2, colour=GRID, width=1):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def document(width, height, parts):
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {FONT}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *parts, "</svg>", ""])


def kept(cell):
    """The share that a way keeps, as decode_bench names it: 1 for dense ways."""
    return cell["kept"] in (KEPT, 1.0)


def tokens_a_second(cell):
    tokens = sum(ACCEPTANCE**i for i in range(cell["draft_length"] + 1))
    return 1e3 * cell["batch"] * tokens / cell["round_ms"]


def speeds(cells, pair, batch):
    """{way: [(kv_len, tokens a second)]}, each at its best draft length."""
    best = {}
    for cell in cells:
        if cell["pair"] != pair or cell["batch"] != batch or cell["way"] not in WAYS or not kept(cell):
            continue
        key = cell["way"], cell["kv_len"]
        best[key] = max(best.get(key, 0.0), tokens_a_second(cell))
    found = {}
    for (way, kv_len), speed in sorted(best.items()):
        found.setdefault(way, []).append((kv_len, speed))
    return found


def ticks(most):
    step = 10 ** math.floor(math.log10(most / 3))
    step *= next(m for m in (1, 2, 5, 10) if most / (m * step) <= 5)
    return [i * step for i in range(int(most / step) + 2)]


def lengths_of(found):
    return sorted({kv_len for points in found.values() for kv_len, _ in points})


def speed_panel(left, top, width, height, title, found):
    lengths = lengths_of(found)
    levels = ticks(max(speed for points in found.values() for _, speed in points))
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])
    x = lambda kv_len: left + width * (math.log2(kv_len) - low) / (high - low)
    y = lambda speed: top + height * (1 - speed / levels[-1])
    parts = [text(left + width / 2, top - 12, title)]
    for level in levels:
        parts += [line(left, y(level), left + width, y(level)), text(left - 8, y(level) + 4, f"{level:g}", "end")]
    for kv_len in lengths:
        parts.append(text(x(kv_len), top + height + 20, f"{kv_len // 1024}K"))
    for way, points in found.items():
        path = " ".join(f"{x(kv_len):.1f},{y(speed):.1f}" for kv_len, speed in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{WAYS[way]}" stroke-width="2.5"/>')
        for kv_len, speed in points:
            parts.append(f'<circle cx="{x(kv_len):.1f}" cy="{y(speed):.1f}" r="3.5" fill="{WAYS[way]}"/>')
    return parts


def draw_speeds(cells):
    width, height, left, top, gap = 270, 260, 70, 80, 76
    panels = [(f"{pair}, batch {batch}", speeds(cells, pair, batch)) for pair, batch in PANELS]
    panels = [(title, found) for title, found in panels if len(lengths_of(found)) > 1]
    if not panels:
        return None
    total = max(left + len(panels) * (width + gap), 3 * 230 + left)
    parts = [text(total / 2, 24, "Tokens a second against context, acceptance 0.8, 22 % kept, best draft length each")]
    for i, (title, found) in enumerate(panels):
        parts += speed_panel(left + i * (width + gap), top, width, height, title, found)
    for i, (way, colour) in enumerate(WAYS.items()):
        at, y = left + i % 3 * 230, top + height + 48 + i // 3 * 24
        parts += [line(at, y, at + 26, y, colour, 3), text(at + 32, y + 4, way, "start")]
    return document(total, top + height + 94, parts)


def draw_phases(cells):
    rows = []
    for pair, kv_len, batch in GOALS:
        for way in PHASE_WAYS:
            for cell in cells:
                same = (cell["pair"], cell["kv_len"], cell["batch"], cell["way"]) == (pair, kv_len, batch, way)
                if same and kept(cell) and cell["draft_length"] == DRAFTS:
                    rows.append((f"{pair}, {kv_len // 1024}K x {batch}", way, cell))
    if not rows:
        return None
    ways = len(PHASE_WAYS)
    left, width, step, top = 380, 640, 26, 76
    most = ticks(max(cell["round_ms"] for _, _, cell in rows))[-1]
    height = top + step * len(rows) + 12 * (len(rows) // ways) + 40
    parts = [text(left + width / 2, 24, "Where a round's time goes, ms: four drafted tokens, 22 % kept")]
    for i, (name, colour) in enumerate(PHASES.values()):
        parts.append(f'<rect x="{left + i * 185}" y="38" width="12" height="12" fill="{colour}"/>')
        parts.append(text(left + i * 185 + 18, 49, name, "start"))
    for i, (name, way, cell) in enumerate(rows):
        y = top + step * i + 12 * (i // ways)
        parts.append(text(left - 10, y + 15, f"{name}: {way}" if i % ways == 0 else way, "end"))
        x = left
        timed = cell["draft_ms"] + cell["guide_ms"] + cell["verify_ms"]
        for phase, (_, colour) in PHASES.items():
            span = (cell["round_ms"] - timed if phase == "rest" else cell[phase]) * width / most
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{max(span, 0):.1f}" height="20" fill="{colour}"/>')
            x += span
        parts.append(text(x + 6, y + 15, f'{cell["round_ms"]:.1f}', "start"))
    return document(left + width + 70, height, parts)


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    lines = pathlib.Path(sys.argv[1]).read_text().splitlines()
    cells = [cell for cell in map(json.loads, lines) if "run" not in cell]
    for name, picture in (("speed", draw_speeds(cells)), ("phases", draw_phases(cells))):
        if picture is None:
            sys.exit(f"{sys.argv[1]}: no cells for the picture of {name}")
        pathlib.Path(f"{sys.argv[2]}-{name}.svg").write_text(picture)


if __name__ == "__main__":
    main()
