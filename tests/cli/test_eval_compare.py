"""`qtip eval --compare` as it is typed. Oracles: the JSON of single evaluations, and the command's own JSON for its table."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from stages.fixtures import Qtip

from cli.test_bad_input import complaint, left_behind
from qtipcli.cli.display import WithError, print_table

LITTLE = ("--context", "32", "--windows", "4")


def test_as_it_is_typed(qtip: Qtip, three: list[Path], tiny_model: Path, text: Path, tmp_path: Path) -> None:
    said = ("--base", tiny_model, "--data", text, *LITTLE)
    outcome = qtip("eval", "--compare", *three, *said, "--plot", "a.png", "--json")
    assert outcome.status == 0, outcome.err
    report = json.loads(outcome.out)
    assert report.keys() == {"base", "protocol", "rows"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert left_behind(tmp_path) == {"a.png"}
    for row, directory in zip(report["rows"], three, strict=True):
        copy = shutil.copytree(directory, tmp_path / "copy" / directory.name)  # the evaluation of one is kept with it
        alone = json.loads(qtip("eval", copy, *said, "--json").out)
        shared = alone.keys() & row.keys()
        assert {"perplexity", "kl_mean", "kl_p99", "top1_agreement", "bits_per_weight", "kl_stderr", "tokens"} <= shared
        assert {name: row[name] for name in shared - {"model"}} == {name: alone[name] for name in shared - {"model"}}
    # The flag may stand anywhere, and models in any order.
    again = qtip("eval", *reversed(three), "--base", tiny_model, "--compare", "--data", text, *LITTLE, "--json")
    assert json.loads(again.out) == report


def test_the_table_has_a_row_for_each_and_states_the_original(
    qtip: Qtip, three: list[Path], tiny_model: Path, text: Path
) -> None:
    asked = ("eval", "--compare", *three, "--base", tiny_model, "--data", text, *LITTLE, "--against", three[0])
    report = json.loads(qtip(*asked, "--json").out)
    lines = qtip(*asked).out.splitlines()
    for row in report["rows"]:
        (line,) = (line for line in lines if line.startswith(f"│ {row['label']} "))
        for value, error in (("perplexity", "perplexity_stderr"), ("kl_mean", "kl_stderr")):
            assert str(WithError(row[value], row[error])) in line
        assert f"{row['kl_p99']:.4g}" in line and ("yes" if row["pareto"] else "no") in line
    (original,) = (line for line in lines if line.startswith("original "))
    assert str(WithError(report["base"]["perplexity"], report["base"]["perplexity_stderr"])) in original
    assert f"content_hash {report['protocol']['content_hash']}" in lines[-1]
    # --against: the other two have a difference, the one itself a dash.
    assert [row["compared_to"] for row in report["rows"]] == [None, str(three[0]), str(three[0])]


def test_a_narrow_terminal_gets_two_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"model": "a", "one": 1.5, "two": 2.5}]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for width, headers in ((100, ["model one two"]), (20, ["model one", "model two"])):
        monkeypatch.setenv("COLUMNS", str(width))
        print_table("", rows, split=2)
        plain = re.sub(r"\x1b\[[0-9;]*m|┃", "", capsys.readouterr().out)
        assert [" ".join(line.split()) for line in plain.splitlines() if "model" in line] == headers


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (2.5974, 0.0453, "2.597 ± 0.045"),
        (0.2429, 0.00481, "0.2429 ± 0.0048"),
        (1234.5, 123.4, "1234 ± 123"),
        (-0.2, 0.0096, "-0.2000 ± 0.0096"),
        (0.0, 0.0, "0"),
        (1.5, None, "1.5"),
    ],
)
def test_a_figure_is_shown_to_the_second_digit_of_its_error(value: float, error: float | None, text: str) -> None:
    assert str(WithError(value, error)) == text


def test_what_is_no_comparison(qtip: Qtip, three: list[Path], tiny_model: Path, tmp_path: Path) -> None:
    two, three_bits, _ = three
    base = ("--base", tiny_model)
    complaint(qtip("eval", "--compare", two, *base), "one model cannot be compared", "several")
    complaint(qtip("eval", two, three_bits, *base), "2 models are given", "--compare")
    complaint(qtip("eval", "--compare", two, three_bits), "needs the original", "--base MODEL")
    complaint(qtip("eval", "--compare", two, two, *base), f"{two} is given twice")
    complaint(qtip("eval", "--compare", two, "./nowhere", *base), "./nowhere does not exist")
    complaint(qtip("eval", "--compare", two, three_bits, "--base", "./nowhere"), "./nowhere does not exist")
    complaint(qtip("eval", "--compare", two, tiny_model, *base), "is the original itself", "leave it out")
    complaint(qtip("eval", "--compare", two, three_bits, *base, "--against", "x"), "--against x is none of the models")
    for option in (("--plot", "a.png"), ("--against", two)):
        complaint(qtip("eval", two, *base, *option), f"{option[0]} belongs to a comparison", "--compare")
    for option in (("--noise-floor",), ("--cache", "kept"), ("--tasks", "piqa")):
        complaint(qtip("eval", "--compare", two, three_bits, *base, *option), f"{option[0]} is not for a comparison")
    complaint(qtip("eval", "--compare", two, three_bits, *base, "--context", "16,32"), "one context, not 2")
    assert not left_behind(tmp_path)


def test_another_vocabulary(qtip: Qtip, three: list[Path], tiny_model: Path, text: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 5000}))
    outcome = qtip("eval", "--compare", three[0], other, "--base", tiny_model, "--data", text, *LITTLE)
    complaint(outcome, "other has a vocabulary of 5,000 tokens", "--base")


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    qtip: Qtip, three: list[Path], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "folder.png").mkdir()
    for target, fact in (
        ("a.pdf", "a.pdf is no PNG file"),
        ("no/a.png", "no does not exist"),
        ("/proc/a.png", "/proc/a.png"),  # root may write anywhere but here
        ("folder.png", "folder.png is a directory"),
    ):
        outcome = qtip("eval", "--compare", *three, "--base", tiny_model, "--plot", target)
        complaint(outcome, fact)
        assert "eval" not in outcome.err.splitlines()[0].split()
    assert left_behind(tmp_path) == {"folder.png"}
