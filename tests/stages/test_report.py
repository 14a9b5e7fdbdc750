"""The report. Oracles: a real HTML parser, the JSON that it is made of, and a browser where one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from qtipcli.errors import SettingsError
from qtipcli.stages import compare, measure
from qtipcli.stages.report import charts, layers, page, svg
from qtipcli.stages.report.layers import layers_of
from stages.fixtures import Qtip

VOID = {"meta", "link", "br", "wbr"}
HOSTILE = """evil</title></h1><script>alert('1')</script>"<img src=https://evil.example/x.png onerror=alert(2)>&amp;"""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Parsed(HTMLParser):
    """A page: its open elements as they close, every attribute, every text, every figure.

    figures: (value, text) of each <data>. Raises AssertionError where an element is closed that is not the one open.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.figures: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "data":
            self.figures.append(dict(attrs)["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))


@pytest.fixture(scope="module")
def one(packed, tiny_model, text):
    found = measure.run_all(str(packed / "out"), str(tiny_model), str(text), (32, 16), 6, noise_floor=True).as_json()
    score = {"task": "arc_easy", "metric": "acc", "filter": "none", "value": 0.51, "stderr": 0.013, "examples": 2376,
             "version": "1.0", "base_value": 0.53, "base_stderr": 0.014, "fewshot": 0}  # fmt: skip
    return json.loads(json.dumps(found | {"tasks": [score]}))


@pytest.fixture(scope="module")
def several(three, tiny_model, text):
    found = compare.run([str(each) for each in three], str(tiny_model), str(text), 32, 6)
    return json.loads(json.dumps(found))


def figures_of(row):
    """Every number of a JSON row but the histogram's bins and the protocol."""
    skipped = ("protocol", "kl_histogram", "pareto", "fewshot")
    return {key: value for key, value in row.items() if isinstance(value, int | float) and key not in skipped}


def check_page(text: str) -> Parsed:
    """What holds for every page: balanced, alone in the world, without scripts."""
    parsed = Parsed(text)
    assert not parsed.open
    assert "script" not in parsed.tags and "iframe" not in parsed.tags and "img" not in parsed.tags
    for tag, name, value in parsed.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "srcset", "action"):
            assert value == "data:,", (tag, name, value)
    style = "".join(content for tag, content in parsed.texts if tag == "style")
    assert "url(" not in style and "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert ("meta", "name", "viewport") in parsed.attributes
    policy = next(value for tag, name, value in parsed.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    for tag, name, value in parsed.attributes:  # the namespace of SVG is a name, not an address
        assert "://" not in (value or "") or (tag, name, value) == ("svg", "xmlns", "http://www.w3.org/2000/svg")
    return parsed


def test_every_figure_of_an_evaluation_appears_with_all_of_its_digits(one):
    parsed = check_page(page.render(one))
    for row in (*one["rows"], *one["tasks"]):
        for name, value in figures_of(row).items():
            assert repr(value) in parsed.figures, name
    said = " ".join(content for _, content in parsed.texts)
    for protocol in (row["protocol"] for row in one["rows"]):
        assert all(str(value) in said.replace("\n", " ") for value in protocol.values() if value is not None)
    for heading in ("Figures", "Divergence token by token", "Zero-shot tasks", "Loss of each layer", "Bits of each layer"):
        assert ("h2", heading) in parsed.texts
    for layer in layers_of(one["model"]):
        assert ("td", layer.name) in parsed.texts
        assert repr(layer.loss) in parsed.figures and repr(layer.bits_per_weight) in parsed.figures


def test_every_figure_of_a_comparison_appears(several):
    parsed = check_page(page.render(several))
    for row in several["rows"]:
        for name, value in figures_of(row).items():
            assert repr(value) in parsed.figures, name
        assert any(content == row["label"] for _, content in parsed.texts)
    assert repr(several["base"]["perplexity"]) in parsed.figures
    assert ("h2", "Size and divergence") in parsed.texts
    assert sum(tag == "summary" for tag in parsed.tags) == 2 * len(several["rows"])  # of each its layers, and their table


def test_the_histogram_has_every_count(one):
    row = one["rows"][0]
    found = re.findall(r"nats: ([\d,]+) tokens", str(charts.histogram(row, charts.WIDE)))
    counts = [count for count in row["kl_histogram"]["counts"] if count]
    assert [int(count.replace(",", "")) for count in found] == counts
    assert sum(counts) + row["kl_histogram"]["below"] + row["kl_histogram"]["above"] == row["tokens"]


def test_a_bar_is_as_high_on_its_axis_as_its_share(one):
    """Oracle: the axis' own labels, of which the highest tells how many pixels a share takes."""
    row = one["rows"][0]
    drawn = str(charts.histogram(row, charts.WIDE))
    ticks = re.findall(r'<text class="tick"[^>]* y="([\d.]+)" text-anchor="end">([\d.]+) %</text>', drawn)
    (low, zero), (high, most) = ([float(value) for value in ticks[place]] for place in (0, -1))
    assert zero == 0 and most > 0
    heights = [float(height) for height in re.findall(r'class="bar"[^>]*height="([\d.]+)"', drawn)]
    counts = [count for count in row["kl_histogram"]["counts"] if count]
    for height, count in zip(heights, counts, strict=True):
        # Coordinates have two decimals, the axis' label three digits.
        assert height == pytest.approx((low - high) * 100 * count / row["tokens"] / most, rel=5e-3, abs=0.02)


def test_without_an_original_the_page_has_no_divergence(packed, text):
    found = measure.run_all(str(packed / "out"), None, str(text), (32,), 4).as_json()
    parsed = check_page(page.render(found))
    assert repr(found["perplexity"]) in parsed.figures
    assert ("h2", "Divergence token by token") not in parsed.texts


def test_a_plain_model_has_no_layers(tiny_model, text):
    parsed = check_page(page.render(measure.run_all(str(tiny_model), None, str(text), (32,), 4).as_json()))
    assert ("h2", "Bits of each layer") not in parsed.texts and layers_of(str(tiny_model)) == []


def test_names_from_outside_are_text_and_nothing_else(one, several):
    hostile = json.loads(json.dumps(one)) | {"model": HOSTILE, "base": HOSTILE}
    for row in hostile["rows"]:
        row["protocol"] |= {"data": HOSTILE, "special_tokens": "</dd><script>"}
    hostile["tasks"][0] |= {"task": HOSTILE, "metric": "<b>"}
    rows = [row | {"model": f"{HOSTILE}{n}", "label": f"{HOSTILE}{n}"} for n, row in enumerate(several["rows"])]
    for row in rows[1:]:
        row["compared_to"] = rows[0]["model"]
    versus = several | {"base": several["base"] | {"model": HOSTILE}, "rows": rows}
    for report in (hostile, versus):
        text = page.render(report)
        parsed = Parsed(text)
        assert not parsed.open and "script" not in parsed.tags and "img" not in parsed.tags and "b" not in parsed.tags
        assert not any(name.startswith("on") for _, name, _ in parsed.attributes)
        joined = "".join(content for _, content in parsed.texts)
        assert "<script>alert('1')</script>" in joined


def test_a_report_asks_nobody_for_a_models_layers(monkeypatch):
    """Only what is on the disk already counts: the hub is not asked, whatever a model is called."""
    asked = []
    monkeypatch.setattr(layers, "cached_file", lambda *what, **how: asked.append(how) or "/nowhere/config.json")
    assert layers.layers_of("org/model") == []
    assert asked == [{"local_files_only": True}]


# Parts


def test_ticks_are_round_and_inside():
    assert svg.log_ticks(1e-6, 10, 8) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10])
    assert svg.log_ticks(0.05, 3, 8) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert svg.linear_ticks(0, 0.121, 4) == pytest.approx([0, 0.05, 0.1])
    assert svg.linear_ticks(480, 690, 8) == pytest.approx([500, 550, 600, 650])
    assert [svg.tick_text(value) for value in (0, 0.001, 0.5, 1e-6, 2e-7, 12345, 1e6)] == [
        "0", "0.001", "0.5", "10⁻⁶", "2·10⁻⁷", "12,345", "10⁶",
    ]  # fmt: skip


def test_marks_labels_meet_no_other():
    """Oracle: each label's box against each other's, and against each mark, which reaches up to its own label."""
    for marks in ([(600, "a" * 15), (610, "b" * 10), (640, "c"), (700, "d" * 9)], [(10, "a" * 20), (50, "b"), (55, "c" * 30)]):
        boxes = []
        for at, text, line, anchor in charts._stacked(marks, 710):
            width = svg.text_width(text)
            boxes.append((at, at if anchor == "start" else at - width, at + width if anchor == "start" else at, line))
        for at, left, right, line in boxes:
            assert left >= 0 and right <= 710
            for other, other_left, other_right, other_line in boxes:
                if other != at:
                    assert line != other_line or right < other_left or other_right < left
                    assert not (left <= other <= right and other_line >= line)


def test_one_layer_of_a_kind_a_block_is_a_line_and_several_are_dots(packed):
    found = layers_of(str(packed / "out"))
    assert [layer.block for layer in found] == sorted(layer.block for layer in found)
    panels = charts.losses(found)
    assert len(panels) == 7 and all("<polyline" in panel for panel in panels)
    assert ["q_proj" in panels[0], "down_proj" in panels[-1]] == [True, True]
    assert sum("worst" in panel for panel in panels) == 1


# As it is typed


def test_as_it_is_typed(qtip: Qtip, own_packed, three, tiny_model, text, tmp_path):
    said = ("--base", tiny_model, "--data", text, "--context", "16", "--windows", "3", "--json")
    outcome = qtip("eval", own_packed, *said, "--html", "one.html")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "one.html").read_text(encoding="utf-8") == page.render(json.loads(outcome.out))
    outcome = qtip("eval", "--compare", *three, *said, "--html", "several.html")
    assert (tmp_path / "several.html").read_text(encoding="utf-8") == page.render(json.loads(outcome.out))
    (tmp_path / "folder.html").mkdir()
    for target, fact in (("a.pdf", "is no HTML file"), ("no/a.html", "no does not exist"), ("folder.html", "is a directory")):
        outcome = qtip("eval", own_packed, *said, "--html", target)
        assert outcome.status in (1, 2) and fact in outcome.err and "eval," not in outcome.err
    with pytest.raises(SettingsError):
        page.check_target(tmp_path / "x.txt")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.skipif(sys.platform != "linux", reason="flags of Linux")
def test_a_browser_shows_it_without_a_word_of_complaint(one, several, tmp_path):
    """Oracle: what Chromium logs of its console, and the elements that it laid out."""
    for name, report in (("one", one), ("several", several)):
        page.write(report, tmp_path / f"{name}.html")
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
            "--disable-component-update --disable-sync --enable-logging=stderr --v=0 --dump-dom"
        )
        command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / name}.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert "CONSOLE" not in done.stderr, done.stderr
        assert done.stdout.count("<svg") == page.render(report).count("<svg") > 0
        assert "parsererror" not in done.stdout
