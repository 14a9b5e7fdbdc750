"""Owns the picture of a comparison: KL and perplexity over stored bits, one above the other, and where names find room."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qtipcli.errors import QtipError
from qtipcli.stages import plot

WIDTH, HEIGHT = 9.0, 9.0
"""Inches. Wide panels, because names are long and lie."""

FONT_SIZE = 8.0
"""Points."""

ROOM = 0.15
"""Share of the range that is free on each side of a panel: names go there."""

LOG_FROM = 4.0
"""Perplexity is drawn on a log scale where the worst model's is this many times the original's or more."""

FLOOR_SHARE = 0.3
"""On the log scale of KL a model that is its original's equal lies at this share of the least KL above zero."""

DIRECTIONS = ((1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (0.5, 1), (0.5, -1), (-0.5, 1), (-0.5, -1))
DISTANCES = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0, 110.0, 150.0)
"""Where a name may lie, seen from its point: x and y, the best first; pixels. From LEADER on a thin line leads to it."""
LEADER = 20.0

POINT_PIXELS = 6.0
"""Half the width of what a point covers."""

LINE_STEP = 4.0
"""A line is taken for points so many pixels apart."""

OUTSIDE, HIDDEN, CUT, CROSSED = 1e4, 100.0, 20.0, 1.0
"""What it costs a name to leave the panel, to cover a point or another name, that its leader runs through one of them for a
LINE_STEP, and to cover a LINE_STEP of a line."""
WAY = 0.05
"""And to go one pixel from its point."""

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw what `compare.run` returned to `path`.

    Both panels have stored bits per weight as x. Above: KL to the original with bars of one standard error, on a log scale;
    below: perplexity, and the original's as a horizontal line. Filled points are on the Pareto front of bits and KL, which is
    the line. Raises QtipError where no row has stored bits, and what `plot.check_target` and `plot.save` raise.
    """
    plot.check_target(path)
    rows = [row for row in report["rows"] if row["bits_per_weight"] is not None]
    if not rows:
        raise QtipError("there is nothing to draw: no model has stored bits per weight", "leave --plot out")
    figure = plot.new_figure(WIDTH, HEIGHT)
    above, below = figure.subplots(2, 1, sharex=True)
    protocol = report["protocol"]
    text = f"{Path(protocol['data']).name}, {protocol['windows']} windows of {protocol['context']} tokens"
    above.set_title(f"original: {report['base']['model']}\n{text}", fontsize=FONT_SIZE + 2)
    kl = [row["kl_mean"] for row in rows]
    floor = FLOOR_SHARE * min((value for value in kl if value > 0), default=1.0)
    heights = [max(value, floor) for value in kl]
    above.set(yscale="log", ylabel="KL in nats")
    _panel(above, rows, heights)
    above.errorbar(
        [row["bits_per_weight"] for row in rows],
        heights,
        # A bar that would reach zero ends above it: a log scale has no zero.
        yerr=[[min(row["kl_stderr"] or 0, 0.9 * height) for row, height in zip(rows, heights, strict=True)],
              [row["kl_stderr"] or 0 for row in rows]],
        fmt="none", ecolor="grey", capsize=2, linewidth=1,
    )  # fmt: skip
    original = report["base"]["perplexity"]
    perplexities = [row["perplexity"] for row in rows]
    below.set(xlabel="bits per weight as stored", ylabel="perplexity")
    below.set_yscale("log" if max(perplexities) >= LOG_FROM * original else "linear")
    below.axhline(original, color="black", linestyle="--", linewidth=1, label=f"original: {original:.4g}")
    _panel(below, rows, perplexities)
    bits = [row["bits_per_weight"] for row in rows]
    room = ROOM * (max(bits) - min(bits) or 1.0)
    below.set_xlim(min(bits) - room, max(bits) + room)
    figure.draw_without_rendering()  # the layout is made now: from here on pixels are where they will be
    names = [row["label"] for row in rows]
    _name(above, names, bits, heights, [])
    _name(below, names, bits, perplexities, [[(min(bits) - room, original), (max(bits) + room, original)]])
    plot.save(figure, path)


def _panel(axes: Any, rows: Sequence[dict[str, Any]], heights: Sequence[float]) -> None:
    """Points and front of one panel."""
    both = list(zip(rows, heights, strict=True))
    front = [(row["bits_per_weight"], height) for row, height in both if row["pareto"]]
    others = [(row["bits_per_weight"], height) for row, height in both if not row["pareto"]]
    axes.plot(*zip(*front, strict=True), color="tab:blue", marker="o", linewidth=1.2, zorder=3, label="Pareto front")
    if others:
        axes.plot(
            *zip(*others, strict=True), color="tab:orange", marker="o", markerfacecolor="white", linestyle="none", zorder=3,
            label="not on the front",
        )  # fmt: skip
    axes.margins(y=ROOM)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_formatter(_tick)
        axes.yaxis.set_minor_formatter(_tick)
    axes.grid(alpha=0.2, which="both")
    axes.legend(fontsize=FONT_SIZE, loc="upper right")


def _tick(value: float, _: int | None = None) -> str:
    """The label of a tick of a log scale: 1, 2 and 5 times a power of ten, in plain digits."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _name(
    axes: Any, names: Sequence[str], x: Sequence[float], y: Sequence[float], lines: Sequence[Sequence[tuple[float, float]]]
) -> None:
    """Write each name where it covers least. lines: more lines to keep clear of than those that the panel's points are on."""
    renderer = axes.figure.canvas.get_renderer()
    points = [tuple(pixel) for pixel in axes.transData.transform(list(zip(x, y, strict=True)))]
    drawn = [*lines, *([*line.get_xydata()] for line in axes.lines if line.get_linestyle() == "-")]
    crossings = [pixel for line in drawn for pixel in sampled([tuple(p) for p in axes.transData.transform(list(line))])]
    taken = [_around(point, POINT_PIXELS, POINT_PIXELS) for point in points]
    legend = axes.get_legend().get_window_extent(renderer)
    taken.append((legend.x0, legend.y0, legend.x1, legend.y1))
    panel = axes.get_window_extent(renderer)
    inside = (panel.x0, panel.y0, panel.x1, panel.y1)
    to_points = 72 / axes.figure.dpi
    for name, point, at in zip(names, points, zip(x, y, strict=True), strict=True):
        text = axes.annotate(
            name, at, xytext=(0, 0), textcoords="offset points", fontsize=FONT_SIZE, ha="center", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}, zorder=2.5,
        )  # fmt: skip
        extent = text.get_window_extent(renderer)
        centre, box = place(point, extent.width, extent.height, taken, crossings, inside)
        taken.append(box)
        offset = (centre[0] - point[0], centre[1] - point[1])
        text.set_position((offset[0] * to_points, offset[1] * to_points))
        way = _leader(point, box)
        if len(way) > 1:
            crossings += way
            edge = way[-1]
            axes.annotate(
                "", at, xytext=((edge[0] - point[0]) * to_points, (edge[1] - point[1]) * to_points),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey", "shrinkA": 0, "shrinkB": 0},
            )  # fmt: skip


def place(
    point: tuple[float, float],
    width: float,
    height: float,
    taken: Sequence[Box],
    crossings: Sequence[tuple[float, float]],
    inside: Box,
) -> tuple[tuple[float, float], Box]:
    """Where a name of this size goes that belongs to `point`: its centre and its box, in pixels.

    taken: boxes of points and other names; crossings: points on lines; inside: the panel. Of all places tried the cheapest.
    """
    tried = []
    for distance, (right, up) in itertools.product(DISTANCES, DIRECTIONS):
        length = math.hypot(right, up)
        centre = (
            point[0] + right * (width / 2 + distance / length),
            point[1] + up * (height / 2 + distance / length),
        )
        box = _around(centre, width / 2, height / 2)
        cost = WAY * distance
        cost += HIDDEN * sum(_overlap(box, other) for other in taken)
        cost += CUT * sum(_within(pixel, other) for pixel in _leader(point, box)[2:] for other in taken)
        cost += CROSSED * sum(_within(pixel, box) for pixel in crossings)
        cost += OUTSIDE * (box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3])
        tried.append((cost, len(tried), centre, box))
    _, _, centre, box = min(tried)
    return centre, box


def _around(centre: tuple[float, float], half_width: float, half_height: float) -> Box:
    return centre[0] - half_width, centre[1] - half_height, centre[0] + half_width, centre[1] + half_height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _within(pixel: tuple[float, float], box: Box) -> bool:
    return box[0] <= pixel[0] <= box[2] and box[1] <= pixel[1] <= box[3]


def _leader(point: tuple[float, float], box: Box) -> list[tuple[float, float]]:
    """The line from a point to its name where that is far; empty where it is near."""
    edge = (min(max(point[0], box[0]), box[2]), min(max(point[1], box[1]), box[3]))
    return sampled([point, edge]) if math.dist(point, edge) >= LEADER else []


def sampled(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points along a line through these, LINE_STEP apart."""
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        count = max(1, round(math.hypot(x1 - x0, y1 - y0) / LINE_STEP))
        found += [(x0 + (x1 - x0) * step / count, y0 + (y1 - y0) * step / count) for step in range(count + 1)]
    return found
