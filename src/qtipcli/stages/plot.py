"""Owns how pictures are drawn and written: as PNG, without a display; and the product benchmark's, a roofline."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from qtipcli.errors import QtipError, SettingsError
from qtipcli.job import files
from qtipcli.job.files import write_atomic
from qtipcli.stages.limits import weights_limit

MARKERS = "osD^v<>Pp"
"""One for each code, in the order of their first rows."""

DPI = 120
"""Pixels an inch: a picture of 9 inches fills half of a wide screen."""

HEADROOM = 2.0
"""The axes reach beyond points and lines by this factor."""


def check_target(path: Path) -> None:
    """Raise SettingsError or StorageError unless a PNG can go to `path`; before a long measurement, not after it."""
    if path.suffix.lower() != ".png":
        raise SettingsError(f"{path} is no PNG file", "give a name that ends in .png")
    files.check_target(path)
    _matplotlib()


def roofline(report: dict[str, Any], path: Path) -> None:
    """Draw the rows of `bench_matvec.run` to `path`.

    x: weights per byte that is read, so that a line through the origin is memory bandwidth; y: weights a second. A point is one
    row; the dense baseline's lie at the left. Horizontal lines are what the device's instruction rate allows each code.
    Raises QtipError where no row has a speed.
    """
    check_target(path)
    rows = [row for row in report["rows"] if row["microseconds"]]
    if not rows:
        raise QtipError("there is nothing to draw: no row has a speed", "see what the report says of each row")
    figure = new_figure(9, 6)
    axes = figure.add_subplot()
    codes = list(dict.fromkeys(row["code"] for row in rows))
    heights = _points(axes, rows, codes)
    bandwidth = report["copy"]["GB_per_s"] * 1e9
    ends = [intensity(16) / HEADROOM, max(intensity(row["bits"]) for row in rows) * HEADROOM]
    axes.plot(ends, [bandwidth * end for end in ends], color="black", label=f"memory: {bandwidth / 1e9:.4g} GB/s copied")
    limits = {code: weights_limit(code, report["lane_operations_per_s"]) for code in codes}
    for limit in sorted({limit for limit in limits.values() if limit}):
        names = ", ".join(code for code in codes if limits[code] == limit)
        axes.axhline(limit, color="grey", linestyle="--")
        axes.text(ends[1], limit, f"instructions: {names}", fontsize=7, horizontalalignment="right", verticalalignment="bottom")
        heights.append(limit)
    axes.set(
        xscale="log", yscale="log", xlim=ends, ylim=(min(heights) / HEADROOM, max(*heights, bandwidth * ends[1]) * HEADROOM)
    )
    axes.set(xlabel="weights per byte read", ylabel="weights per second", title=f"Packed product, {report['device']}")
    rates = sorted({16.0, *(row["bits"] for row in rows)})
    axes.set_xticks([intensity(bits) for bits in rates], [f"{intensity(bits):.3g}\n{bits:g} bits" for bits in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    axes.legend(fontsize="small")
    save(figure, path)


def _points(axes: Any, rows: list[dict[str, Any]], codes: list[str]) -> list[float]:
    """Draw every row and its baseline; returns how high they lie."""
    heights = []
    for number, code in enumerate(codes):
        mine = [row for row in rows if row["code"] == code]
        speeds = [row["weights_per_s"] for row in mine]
        axes.scatter(
            [intensity(row["bits"]) for row in mine], speeds, marker=MARKERS[number % len(MARKERS)], label=code, zorder=3
        )
        for row, speed in zip(mine, speeds, strict=True):
            if row["batch"] > 1:
                axes.annotate(
                    f"x{row['batch']}", (intensity(row["bits"]), speed), textcoords="offset points", xytext=(5, -3), fontsize=7
                )
        heights += speeds
    dense = [row["weights_per_s"] / row["ratio"] for row in rows]
    axes.scatter([intensity(16)] * len(dense), dense, marker="x", color="black", label=f"torch {rows[0]['baseline']}", zorder=3)
    return heights + dense


def intensity(bits: float) -> float:
    """Weights per byte at `bits` bits a weight."""
    return 8 / bits


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure of this size in inches, whose canvas needs no display."""
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(width, height), dpi=DPI, layout="constrained")
    canvas_class(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write the figure to `path` as PNG, complete or not at all. Raises StorageError."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomic(path, [content.getvalue()])


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QtipError("matplotlib is not installed, which draws the plot", "pip install matplotlib") from error
    return Figure, FigureCanvasAgg
