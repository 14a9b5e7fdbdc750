"""Owns the issue's table: what was asked for, what was aimed at, and what a report measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

COMPUTED = ("1mad", "mul1", "3inst", "mcg")
HYBRID = ("hyb",)

Row = dict[str, Any]
Sections = dict[str, dict[str, Any]]


def figures(sections: Sections) -> list[Row]:
    """One row a figure: figure, asked, aim, measured (None where it was not), met (None likewise); for products also
    the slowest row's code, share of the bandwidth and share of what the instruction rate allows."""
    found = [
        _decoded(sections),
        _figure("matvec error over torch's, fp16 and bf16, worst", 2.0, None, _errors(sections), most=True),
    ]
    for label, codes, bits, batch, asked, aim in (
        ("2 bits, batch 1, HYB", HYBRID, 2.0, 1, 2.5, 4.0),
        ("2 bits, batch 1, computed codes, slowest", COMPUTED, 2.0, 1, 1.5, 2.5),
        ("4 bits, batch 1, HYB", HYBRID, 4.0, 1, 1.7, None),
        ("4 bits, batch 1, computed codes, slowest", COMPUTED, 4.0, 1, 1.7, None),
        ("2 bits, batch 16, HYB", HYBRID, 2.0, 16, 1.3, None),
        ("2 bits, batch 16, computed codes, slowest", COMPUTED, 2.0, 16, 1.3, None),
        ("4 bits, batch 16, HYB", HYBRID, 4.0, 16, 1.3, None),
        ("4 bits, batch 16, computed codes, slowest", COMPUTED, 4.0, 16, 1.3, None),
    ):
        rows = [
            row for row in _rows(sections, "matvec") if row["code"] in codes and (row["bits"], row["batch"]) == (bits, batch)
        ]
        slowest = min((row for row in rows if row["ratio"]), key=lambda row: row["ratio"], default=None)
        figure = _figure(f"times torch FP16: {label}", asked, aim, slowest and slowest["ratio"])
        found.append(
            figure | {"slowest": slowest and {key: slowest[key] for key in ("code", "bandwidth_share", "limit_share")}}
        )
    prefill = [row["ratio"] for row in _rows(sections, "prefill") if row["ratio"]]
    found.append(_figure("prefill rows, times torch FP16, slowest", 0.7, None, min(prefill, default=None)))
    speeds = [row["weights_per_s"] / 1e6 for row in _rows(sections, "encoder")]
    found.append(_figure("encoder, 2 bits, M weights/s, slowest code", 10.0, 25.0, min(speeds, default=None)))
    for section, label in (("model", "CUDA graphs"), ("model compiled", "torch.compile and CUDA graphs")):
        decode = [row["ratio"] for row in _rows(sections, section) if row["measure"] == "decode"]
        found.append(_figure(f"8B model decode, times FP16, {label}", 2.5, None, min(filter(None, decode), default=None)))
    return found


def crossover_batches(sections: Sections) -> dict[str, int | None]:
    """Code -> the smallest batch measured from which on decoding to a buffer is faster; None where it never is."""
    found: dict[str, int | None] = {}
    for code in dict.fromkeys(row["code"] for row in _rows(sections, "crossover")):
        rows = [row for row in _rows(sections, "crossover") if row["code"] == code]
        faster = [row["batch"] for row in rows if row["decoded_us"] < row["fused_us"]]
        slower = max((row["batch"] for row in rows if row["decoded_us"] >= row["fused_us"]), default=0)
        found[code] = min((batch for batch in faster if batch > slower), default=None)
    return found


def markdown(rows: Iterable[Row]) -> str:
    """The figures as a table for docs/benchmarks/gpu.md."""
    lines = ["| figure | asked | aim | measured | met |", "|---|---|---|---|---|"]
    for row in rows:
        met = {True: "yes", False: "no", None: ""}[row["met"]]
        cells = [_text(row[name]) for name in ("asked", "aim", "measured")]
        lines.append(f"| {row['figure']} | {' | '.join(cells)} | {met} |")
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _figure(name: str, asked: float, aim: float | None, measured: float | None, most: bool = False) -> Row:
    met: bool | None = None
    if measured is not None:
        met = measured <= asked if most else measured >= asked
    return {"figure": name, "asked": asked, "aim": aim, "measured": measured, "met": met}


def _rows(sections: Sections, name: str) -> list[Row]:
    return sections.get(name, {}).get("rows", [])


def _decoded(sections: Sections) -> Row:
    rows = _rows(sections, "decode")
    different = max((row["different"] for row in rows), default=None)
    return _figure("decoded weights that differ from the reference, of 10^8, worst code", 0, None, different, most=True)


def _errors(sections: Sections) -> float | None:
    errors: list[float] = [error for row in _rows(sections, "accuracy") for error in row["errors"]]
    errors += [row["error"] for row in _rows(sections, "matvec") if row["error"] is not None]
    return max(errors, default=None)
