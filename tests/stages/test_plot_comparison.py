"""The picture of a comparison. Oracles: the report it shows, and the extents of its names as matplotlib measures them."""

from __future__ import annotations

import itertools
import math
import random
import struct

import pytest

from qtipcli.errors import QtipError
from qtipcli.stages import compare, plot, plot_comparison

LONG = "tinystories-llama-1m-qtip-{}bit{}"


def report(count: int, seed: int = 0, name: str = LONG, **changes) -> dict:
    """Models around a curve that falls by four for each bit, some at nearly the same bits, as real ones lie."""
    chance = random.Random(seed)
    points = []
    for _ in range(count):
        bits = chance.choice([2, 2.5, 3, 3.5, 4]) + chance.choice([0.01, 0.02, 0.2])
        points.append((bits, 2.2 * 4 ** (1 - bits) * chance.choice([0.8, 1, 1.02, 1.3])))
    rows = [
        {
            "label": name.format(number, "-tuned" if number % 2 else ""),
            "bits_per_weight": bits,
            "kl_mean": kl,
            "kl_stderr": 0.02 * kl,
            "perplexity": 2 * math.exp(kl),
            "pareto": front,
        }
        for number, ((bits, kl), front) in enumerate(zip(points, compare.pareto_front(points), strict=True))
    ]
    rows.sort(key=lambda row: row["bits_per_weight"])
    return {
        "base": {"model": "models/original", "perplexity": 2.0},
        "protocol": {"data": "text/heldout.txt", "windows": 64, "context": 256},
        "rows": [row | changes for row in rows],
    }


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a report; returns both panels."""
    real = plot.new_figure
    drawn = []
    monkeypatch.setattr(plot, "new_figure", lambda *size: drawn.append(real(*size)) or drawn[-1])

    def run(report):
        plot_comparison.draw(report, tmp_path / "a.png")
        return drawn[-1].axes

    return run


def names_in(axes):
    """Text -> its extent in pixels."""
    renderer = axes.figure.canvas.get_renderer()
    return {text.get_text(): text.get_window_extent(renderer) for text in axes.texts if text.get_text()}


def test_it_is_a_png_of_some_size(draw, tmp_path):
    draw(report(4))
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert min(struct.unpack(">II", data[16:24])) > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_it_shows_every_row_the_front_as_a_line_and_the_original(draw):
    shown = report(8, 3)
    assert 1 < sum(row["pareto"] for row in shown["rows"]) < 8
    for axes, figure in zip(draw(shown), ("kl_mean", "perplexity"), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        for label, pareto in (("Pareto front", True), ("not on the front", False)):
            expected = [[row["bits_per_weight"], row[figure]] for row in shown["rows"] if row["pareto"] is pareto]
            assert lines[label].get_xydata().tolist() == expected
        assert lines["Pareto front"].get_linestyle() == "-"
        assert names_in(axes).keys() == {row["label"] for row in shown["rows"]}
        assert axes.get_yscale() == ("log" if figure == "kl_mean" else "linear")
    assert set(lines["original: 2"].get_ydata()) == {2.0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [3, 5, 8, 12])
def test_no_name_covers_another_or_leaves_its_panel(draw, count, seed):
    for axes in draw(report(count, seed)):
        extents = names_in(axes)
        panel = axes.get_window_extent()
        assert len(extents) == count
        for one, other in itertools.combinations(extents.values(), 2):
            assert not one.overlaps(other)
        for extent in extents.values():
            assert panel.x0 <= extent.x0 and extent.x1 <= panel.x1 and panel.y0 <= extent.y0 and extent.y1 <= panel.y1
            assert not extent.overlaps(axes.get_legend().get_window_extent())


def test_a_name_goes_where_there_is_room():
    panel = (0.0, 0.0, 1000.0, 1000.0)
    centre, _ = plot_comparison.place((500, 500), 100, 10, [], [], panel)
    assert centre == (500 + 50 + plot_comparison.DISTANCES[0], 500)  # to the right, close by
    centre, _ = plot_comparison.place((950, 500), 100, 10, [], [], panel)
    assert centre == (950 - 50 - plot_comparison.DISTANCES[0], 500)  # no room at the right
    centre, _ = plot_comparison.place((500, 500), 100, 10, [(510, 400, 700, 600)], [(450, 500)], panel)
    assert abs(centre[1] - 500) > 5  # another name at the right, a line at the left


def test_models_without_bits_are_left_out_and_an_equal_of_the_original_lies_at_the_bottom(draw):
    shown = report(4)
    shown["rows"][-1]["kl_mean"] = 0.0
    shown["rows"].append(shown["rows"][0] | {"label": "unknown", "bits_per_weight": None, "pareto": None})
    above, _ = draw(shown)
    heights = [y for line in above.lines if line.get_label() in ("Pareto front", "not on the front") for y in line.get_ydata()]
    least = min(row["kl_mean"] for row in shown["rows"] if row["kl_mean"] > 0)
    assert len(heights) == 4 and min(heights) == plot_comparison.FLOOR_SHARE * least
    assert "unknown" not in names_in(above)
    with pytest.raises(QtipError, match="no model has stored bits"):
        draw(report(2, bits_per_weight=None))


def test_one_window_and_a_model_that_fell_apart(draw):
    _, below = draw(report(3, kl_stderr=None, perplexity=1e4))
    assert below.get_yscale() == "log"
    above, below = draw(report(2, bits_per_weight=2.0))
    assert len(names_in(above)) == len(names_in(below)) == 2
