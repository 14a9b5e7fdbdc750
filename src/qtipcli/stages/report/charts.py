"""Owns the report's pictures: what is drawn on which axes, and how wide. Each returns SVG text.

Charts whose labels would be too small on a telephone are drawn for two widths; style.css shows the one that fits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from qtipcli.stages.figures import text_of
from qtipcli.stages.plot_comparison import Box, place, sampled
from qtipcli.stages.report.layers import Layer, kinds_of
from qtipcli.stages.report.svg import Picture, Scale, shortened, text_width, tick_text

WIDE, NARROW = 720.0, 340.0
"""Pixels: a column of text on a desk, and a telephone held upright."""

MARKS = (
    ("kl_median", "median"), ("kl_mean", "mean"), ("kl_p99", "99 %"), ("kl_p999", "99.9 %"), ("kl_max", "max"),
)  # fmt: skip
FLOOR = ("kl_noise_floor", "noise floor")
ROW = 14.0
"""Pixels from one line of labels to the next."""

PANEL_WIDTH, PANEL_HEIGHT = 168.0, 122.0
CELL_HEIGHT = 20.0
CELL_NUMBER_WIDTH = 27.0
"""A cell of the table of bits has its number written into it from this width on."""

FAINTEST = 0.14
"""Opacity of the cell with the fewest bits."""


def both_widths(draw: Callable[[float], Picture]) -> str:
    """The same chart for a wide and for a narrow page."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def histogram(row: dict[str, Any], width: float, span: tuple[float, float] | None = None) -> Picture:
    """KL of every token on a log scale, with the row's summary figures as marks.

    row: as EvaluationResult.as_json. span: the KL that the axis goes from and to, for several charts alike; see `kl_span`.
    """
    edges, counts = row["kl_histogram"]["edges"], row["kl_histogram"]["counts"]
    low, high = span or kl_span([row])
    left, right, bottom = 44.0, 10.0, 40.0
    x = Scale(low, high, left, width - right, log=True)
    marks = [(x(max(row[key], low)), f"{name} {text_of(row[key])}") for key, name in MARKS if row.get(key)]
    labels = _stacked(marks, width - right)
    lines = 1 + max((line for _, _, line, _ in labels), default=0)
    floor = row.get(FLOOR[0]) or 0
    if floor >= low:
        # It lies far to the left of all others: above them its label meets none of them.
        labels.append((x(floor), f"{FLOOR[1]} {text_of(floor)}", lines, "start"))
    lines += floor >= low
    top = 10 + ROW * lines
    height = top + (170 if width > NARROW else 140) + bottom
    shares = [count / row["tokens"] for count in counts]
    y = Scale(0, max([*shares, 1e-12]), height - bottom, top + 6)
    name = f"Histogram of the KL divergence of {row['tokens']:,} tokens, {row['protocol']['context']} tokens of context"
    picture = Picture(width, height, name)
    for tick in y.ticks(4):
        picture.line(left, y(tick), width - right, y(tick), "grid")
        picture.text(left - 6, y(tick) + 4, f"{100 * tick:.3g} %", "tick", "end")
    for start, end, count, share in zip(edges, edges[1:], counts, shares, strict=False):
        if count and x(end) > left and x(start) < width - right:
            hint = f"{tick_text(start)} to {tick_text(end)} nats: {count:,} tokens, {100 * share:.3g} %"
            picture.box(x(start) + 0.5, y(share), x(end) - x(start) - 1, y(0) - y(share), "bar", hint)
    _bottom_axis(picture, x, height - bottom, left, width - right, "KL of a token, in nats, log scale")
    if 0 < floor < low:
        picture.text(left, 12, f"← {FLOOR[1]} {text_of(floor)}", "noise-label")
    for at, text, line, anchor in labels:
        level = top - 4 - ROW * line
        kind = "noise" if text.startswith(FLOOR[1]) else "mark"
        picture.line(at, level - 4, at, height - bottom, kind)
        picture.text(at + (4 if anchor == "start" else -4), level, text, f"{kind}-label", anchor)
    return picture


def kl_span(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Whole decades that hold every non-empty bin and every summary figure above zero of these rows."""
    values = [row[key] for row in rows for key, _ in MARKS if row.get(key)]
    for row in rows:
        edges, counts = row["kl_histogram"]["edges"], row["kl_histogram"]["counts"]
        filled = [index for index, count in enumerate(counts) if count]
        values += [edges[index] for index in filled] + [edges[index + 1] for index in filled]
    values = [value for value in values if value >= 1e-12] or [1e-9, 1.0]
    low, high = math.floor(math.log10(min(values)) + 1e-9), math.ceil(math.log10(max(values)) - 1e-9)
    return 10.0**low, 10.0 ** max(high, low + 1)


def losses(layers: list[Layer]) -> list[str]:
    """One panel for each kind of layer: relative proxy loss by block, all on the same log scale."""
    found = [layer for layer in layers if layer.loss is not None and layer.loss > 0 and layer.block is not None]
    if not found:
        return []
    low, high = min(layer.loss for layer in found), max(layer.loss for layer in found)
    room = max(1.15, (high / low) ** 0.06)
    middle = sorted(layer.loss for layer in found)[len(found) // 2]
    worst = max(found, key=lambda layer: layer.loss)
    blocks = max(layer.block for layer in found)
    y = Scale(low / room, high * room, PANEL_HEIGHT - 22, 26, log=True)
    x = Scale(0, max(blocks, 1), 46, PANEL_WIDTH - 10)
    return [str(_panel(kind, own, x, y, middle, worst)) for kind, own in kinds_of(found).items()]


def _panel(kind: str, layers: list[Layer], x: Scale, y: Scale, middle: float, worst: Layer) -> Picture:
    picture = Picture(PANEL_WIDTH, PANEL_HEIGHT, f"Relative proxy loss of {kind} by block", "panel")
    picture.text(0, 12, shortened(kind, 24), "title")
    for tick in y.ticks(4):
        picture.line(x.start - 6, y(tick), PANEL_WIDTH - 4, y(tick), "grid")
        picture.text(x.start - 10, y(tick) + 4, tick_text(tick), "tick", "end")
    picture.line(x.start - 6, y(middle), PANEL_WIDTH - 4, y(middle), "middle")
    # Several layers of one kind in a block are experts: dots alone, since no line joins them.
    if len({layer.block for layer in layers}) == len(layers):
        picture.path([(x(layer.block), y(layer.loss)) for layer in layers], "curve")
    for layer in layers:
        kind_of_dot = "worst" if layer is worst else "point"
        radius = 4 if layer is worst else 2.6 if len(layers) <= 48 else 1.6
        picture.dot(x(layer.block), y(layer.loss), radius, kind_of_dot, f"{layer.name}: {layer.loss:.4g}")
    for tick in dict.fromkeys((0, int(x.high))):
        if tick <= max(layer.block for layer in layers):
            picture.text(x(tick), PANEL_HEIGHT - 6, str(tick), "tick", "middle")
    picture.text((x.start + x.end) / 2, PANEL_HEIGHT - 6, "block", "tick", "middle")
    return picture


def bits(layers: list[Layer], width: float) -> Picture:
    """A table of cells, kinds of layers by blocks, the darker the more stored bits a weight."""
    kinds = kinds_of(layers)
    blocks = 1 + max(layer.block for layer in layers if layer.block is not None)
    most = 30 if width > NARROW else 16
    left = 8 + max(text_width(shortened(kind, most)) for kind in kinds)
    cell = (width - left) / blocks
    values = [layer.bits_per_weight for own in kinds.values() for layer in own]
    low, high = min(values), max(values)
    picture = Picture(width, 22 + CELL_HEIGHT * len(kinds), "Stored bits a weight of each layer")
    for row, (kind, own) in enumerate(kinds.items()):
        top = CELL_HEIGHT * row
        picture.text(0, top + 14, shortened(kind, most), "label")
        for block in range(blocks):
            here = [layer.bits_per_weight for layer in own if layer.block == block]
            if not here:
                continue
            value = sum(here) / len(here)
            # Layers that differ by their scales' bytes alone are shown alike.
            shade = (value - low) / (high - low) if high - low > 0.05 else 0.4
            opacity = FAINTEST + (1 - FAINTEST) * shade
            hint = f"block {block}, {kind}: {value:.3f} bits"
            picture.box(left + cell * block + 0.5, top + 0.5, cell - 1, CELL_HEIGHT - 1, "cell", hint, opacity)
            if cell >= CELL_NUMBER_WIDTH:
                kind_of_text = "in-dark" if opacity > 0.6 else "in-light"
                picture.text(left + cell * (block + 0.5), top + 14, f"{value:.2f}", kind_of_text, "middle")
    below = CELL_HEIGHT * len(kinds) + 15
    for block in dict.fromkeys((0, blocks - 1)):
        picture.text(left + cell * (block + 0.5), below, str(block), "tick", "middle")
    if blocks > 2:
        picture.text(left + cell * blocks / 2, below, "block", "tick", "middle")
    return picture


def size_against_kl(rows: Sequence[dict[str, Any]], width: float) -> Picture:
    """Models by what they take on disk and by their KL to the original; the line joins those on the Pareto front."""
    rows = [row for row in rows if row["size_MB"] is not None and row["kl_mean"] > 0]
    left, right, top, bottom = 54.0, 12.0, 14.0, 42.0
    height = 340.0 if width > NARROW else 300.0
    sizes, divergences = [row["size_MB"] for row in rows], [row["kl_mean"] for row in rows]
    room = 0.16 * ((max(sizes) - min(sizes)) or max(sizes))
    x = Scale(max(0, min(sizes) - room), max(sizes) + room, left, width - right)
    y = Scale(min(divergences) / 1.8, max(divergences) * 1.8, height - bottom, top, log=True)
    picture = Picture(width, height, "KL to the original by size on disk")
    for tick in y.ticks(8):
        picture.line(left, y(tick), width - right, y(tick), "grid")
        picture.text(left - 6, y(tick) + 4, tick_text(tick), "tick", "end")
    picture.text(12, (top + height - bottom) / 2, "KL to the original, nats, log scale", "axis", "middle", turned=True)
    _bottom_axis(picture, x, height - bottom, left, width - right, "MB on disk")
    front = _front(rows)
    line = [(x(row["size_MB"]), y(row["kl_mean"])) for row in front]
    picture.path(line, "curve")
    for row in rows:
        at, error = x(row["size_MB"]), row["kl_stderr"] or 0
        # A bar that would reach zero ends above it: a log scale has no zero.
        lowest = max(row["kl_mean"] - error, row["kl_mean"] * 0.1)
        picture.line(at, y(row["kl_mean"] + error), at, y(lowest), "error")
        hint = f"{row['label']}: {row['size_MB']:.4g} MB, KL {row['kl_mean']:.4g}"
        picture.dot(at, y(row["kl_mean"]), 4.5, "point" if row in front else "off-front", hint)
    points = [(x(row["size_MB"]), y(row["kl_mean"])) for row in rows]
    names = [shortened(row["label"], 40 if width > NARROW else 18) for row in rows]
    _write_names(picture, names, points, sampled(line), (left, top, width - right, height - bottom))
    return picture


def _write_names(
    picture: Picture, names: list[str], points: list[tuple[float, float]], line: list[tuple[float, float]], inside: Box
) -> None:
    taken = [(at - 6, level - 6, at + 6, level + 6) for at, level in points]
    for name, point in zip(names, points, strict=True):
        (at, level), box = place(point, text_width(name), 12, taken, line, inside)
        taken.append(box)
        picture.text(at, level + 4, name, "label", "middle")


def _front(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those than which no other takes as little and loses as little, by size."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["size_MB"], row["kl_mean"])):
        if not found or row["kl_mean"] < found[-1]["kl_mean"]:
            found.append(row)
    return found


def _bottom_axis(picture: Picture, x: Scale, level: float, left: float, right: float, name: str) -> None:
    picture.line(left, level, right, level, "base")
    for tick in x.ticks(8 if right - left > NARROW else 5):
        picture.line(x(tick), level, x(tick), level + 4, "base")
        picture.text(x(tick), level + 17, tick_text(tick), "tick", "middle")
    picture.text((left + right) / 2, level + 36, name, "axis", "middle")


def _stacked(labels: Sequence[tuple[float, str]], right: float) -> list[tuple[float, str, int, str]]:
    """(x, text) -> (x, text, line, anchor), the line counted upwards: a label beside its mark crosses no other label or mark.

    All labels lie on the same side of their marks, to the right where all of them end before `right`. Then a label can meet
    only marks further on that way, and has to lie higher than theirs.
    """
    fits = all(at + text_width(text) + 4 <= right for at, text in labels)
    side = 1 if fits else -1
    found: list[tuple[float, str, int, str]] = []
    for at, text in sorted(labels, key=lambda label: -side * label[0]):
        met = [line for other, _, line, _ in found if (other - at) * side < text_width(text) + 10]
        found.append((at, text, 1 + max(met, default=-1), "start" if fits else "end"))
    return found
