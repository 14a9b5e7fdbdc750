"""Owns the report of `qtip eval`: its parts, their order and words, as one HTML file without scripts or anything from outside.

Every figure stands in a <data> element whose value has all of its digits. What comes from outside (names of models, data and
layers) is escaped; a policy in the page's head forbids scripts and requests besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import qtipcli
from qtipcli.errors import SettingsError
from qtipcli.job import files
from qtipcli.job.files import write_text_atomic
from qtipcli.stages.figures import WithError, text_of
from qtipcli.stages.report import charts
from qtipcli.stages.report.layers import Layer, layers_of

STYLE = Path(__file__).with_name("style.css")

FIELDS = {
    "data": "text",
    "content_hash": "sha256 of text and windows",
    "windows": "windows",
    "context": "tokens a window",
    "special_tokens": "special tokens",
    "dtype": "evaluated model in",
    "base_dtype": "original in",
    "noise_dtype": "noise floor: original in",
    "device": "on",
    "placement": "evaluated",
    "software": "software",
    "positions": "predictions that count",
    "arithmetic": "arithmetic",
}
"""Fields of Protocol -> what a reader is told they are."""


def check_target(path: Path) -> None:
    """Raise SettingsError or StorageError unless a report can go to `path`; before a long measurement, not after it."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"{path} is no HTML file", "give a name that ends in .html")
    files.check_target(path)


def write(report: dict[str, Any], path: Path) -> None:
    """Write the report of what `measure.Evaluation.as_json` or `compare.run` returned. Raises StorageError."""
    write_text_atomic(path, render(report))


def render(report: dict[str, Any]) -> str:
    """The page as text. Layers are read from the models' directories, where qtip packed them."""
    return _page(*(_comparison(report) if "model" not in report else _evaluation(report)))


# ---- one model -------------------------------------------------------------------------------------------------------------


def _evaluation(report: dict[str, Any]) -> tuple[str, str]:
    """(title, body)."""
    rows, base = report["rows"], report["base"]
    beside = f"beside its original <strong>{_breakable(base)}</strong>" if base else "without an original to compare to"
    text = _text_read(rows[0]["tokens"], rows[0]["protocol"])
    parts = [
        _header("Evaluation", report["model"], f"{beside}<br>{text}"),
        _headline(rows[0]),
        _section("Figures", _figures(rows), _LEGEND if base else "±: one standard error over windows."),
        _divergences(rows, [f"{row['protocol']['context']} tokens of context" for row in rows]) if base else "",
        _section("Zero-shot tasks", _tasks(report["tasks"]), _TASKS) if report.get("tasks") else "",
        _layers(layers_of(report["model"])),
        _section("Protocol", _protocol([row["protocol"] for row in rows])),
    ]
    return report["model"], "".join(parts)


_LEGEND = (
    "±: one standard error over windows. KL is that of the original to the model, in nats a token: 0 for a model that predicts "
    "as the original does. Top-1: share of tokens where both put the same one first. Noise floor: the KL of the original to "
    "itself with its rounding, the least that a figure can mean."
)
_TASKS = "Scores of lm-eval without examples in front of the question; ±: its standard errors over examples."


def _headline(row: dict[str, Any]) -> str:
    """The few figures that a reader looks for first."""
    found = []
    if row["kl_mean"] is not None:
        found += [
            ("KL to the original", _pair(row["kl_mean"], row["kl_stderr"]), "nats a token"),
            ("same first token", _pair(row["top1_agreement"], row["top1_stderr"], 100, " %"), "top-1 agreement"),
        ]
    beside = "" if row["base_perplexity"] is None else f"original {_data(row['base_perplexity'])}"
    found.append(("perplexity", _pair(row["perplexity"], row["perplexity_stderr"]), beside))
    if row["bits_per_weight"] is not None:
        found.append(("bits per weight", _data(row["bits_per_weight"]), "as stored, packed layers"))
    cells = "".join(
        f"<div><dt>{name}</dt><dd><span class='big'>{value}</span><small>{note}</small></dd></div>"
        for name, value, note in found
    )
    return f"<dl class='headline'>{cells}</dl>"


def _figures(rows: Sequence[dict[str, Any]]) -> str:
    """A column for each context, so that the table is as narrow as a telephone."""
    lines = [
        ("tokens", lambda row: _data(row["tokens"], f"{row['tokens']:,}")),
        ("perplexity", lambda row: _pair(row["perplexity"], row["perplexity_stderr"])),
    ]
    if rows[0]["kl_mean"] is not None:
        lines += [
            ("perplexity of the original", lambda row: _data(row["base_perplexity"])),
            ("ratio of the two", lambda row: _pair(row["perplexity_ratio"], row["perplexity_ratio_stderr"])),
            *((name if name.startswith(("KL", "top")) else f"KL {name}", cell) for name, cell in _KL_COLUMNS),
        ]
    if rows[0]["kl_noise_floor"] is not None:
        lines.append(("KL noise floor", lambda row: _data(row["kl_noise_floor"])))
    columns = [("context", lambda line: line[0])]
    columns += [(_data(row["protocol"]["context"]), lambda line, row=row: line[1](row)) for row in rows]
    return _table(columns, lines)


_KL_COLUMNS = [
    ("KL mean", lambda row: _pair(row["kl_mean"], row["kl_stderr"])),
    ("median", lambda row: _data(row["kl_median"])),
    ("99 %", lambda row: _data(row["kl_p99"])),
    ("99.9 %", lambda row: _data(row["kl_p999"])),
    ("max", lambda row: _data(row["kl_max"])),
    ("top-1", lambda row: _pair(row["top1_agreement"], row["top1_stderr"])),
]


def _tasks(scores: Sequence[dict[str, Any]]) -> str:
    columns = [
        ("task", lambda score: escape(score["task"])),
        ("metric", lambda score: escape(score["metric"] + ("" if score["filter"] == "none" else f" ({score['filter']})"))),
        ("score", lambda score: _pair(score["value"], score["stderr"])),
        (
            "original&rsquo;s",
            lambda score: "&ndash;" if score["base_value"] is None else _pair(score["base_value"], score["base_stderr"]),
        ),
        ("examples", lambda score: _data(score["examples"])),
    ]
    return _table(columns, scores)


# ---- several models --------------------------------------------------------------------------------------------------------


def _comparison(report: dict[str, Any]) -> tuple[str, str]:
    """(title, body)."""
    rows, base = report["rows"], report["base"]
    original = (
        f"beside <strong>{_breakable(base['model'])}</strong>, perplexity "
        f"{_pair(base['perplexity'], base['perplexity_stderr'])}<br>{_text_read(rows[0]['tokens'], report['protocol'])}"
    )
    sizes = [row for row in rows if row["size_MB"] is not None and row["kl_mean"] > 0]
    title = f"{len(rows)} models compared"
    parts = [
        _header("Comparison", title, original),
        _section(
            "Size and divergence",
            charts.both_widths(lambda width: charts.size_against_kl(sizes, width)),
            "Lower and further to the left is better. The line joins models that no other beats in both; bars are one standard "
            "error.",
        )
        if sizes
        else "",
        _section("Figures", f"<div class='breakout'>{_compared(rows)}</div>", f"{_LEGEND.partition(' Noise')[0]} {_STEP}"),
        _divergences(rows, [row["label"] for row in rows], report["protocol"]),
        *(_folded(f"Layers of {row['label']}", _layers(layers_of(row["model"]))) for row in rows),
        _section("Protocol", _protocol([report["protocol"]])),
    ]
    return title, "".join(parts)


_STEP = (
    "In bold: no other model takes as few bits and loses as little. Step: KL less that of the model it is compared to, with "
    "the paired standard error, since both saw the same windows."
)


def _compared(rows: Sequence[dict[str, Any]]) -> str:
    names = {row["model"]: row["label"] for row in rows}
    columns = [
        ("model", lambda row: f"<strong>{escape(row['label'])}</strong>" if row["pareto"] else escape(row["label"])),
        ("bits", lambda row: _data(row["bits_per_weight"])),
        ("MB", lambda row: _data(row["size_MB"])),
        ("perplexity", lambda row: _pair(row["perplexity"], row["perplexity_stderr"])),
        ("ratio", lambda row: _pair(row["perplexity_ratio"], row["perplexity_ratio_stderr"])),
        *_KL_COLUMNS,
        ("step", lambda row: _step(row, names)),
    ]
    return _table(columns, rows)


def _step(row: dict[str, Any], names: dict[str, str]) -> str:
    if row["kl_difference"] is None:
        return "&ndash;"
    step = _pair(row["kl_difference"], row["kl_difference_stderr"])
    return f"{step} <small>to {escape(names[row['compared_to']])}</small>"


# ---- parts of both ---------------------------------------------------------------------------------------------------------


def _header(kind: str, title: str, beside: str) -> str:
    return f"<header><p class='kind'>{kind}</p><h1>{_breakable(title)}</h1><p>{beside}</p></header>"


def _text_read(tokens: int, protocol: dict[str, Any]) -> str:
    return f"{_data(tokens, f'{tokens:,}')} tokens of {_breakable(protocol['data'])}, context {protocol['context']:,}"


def _breakable(name: str) -> str:
    """A path may be broken after its slashes."""
    return escape(name).replace("/", "/<wbr>")


def _divergences(rows: Sequence[dict[str, Any]], names: Sequence[str], protocol: dict[str, Any] | None = None) -> str:
    """A histogram a row, all with one axis. protocol: of rows that have none of their own."""
    span = charts.kl_span(rows)
    figures = []
    for row, name in zip(rows, names, strict=True):
        own = row if protocol is None else row | {"protocol": protocol}
        picture = charts.both_widths(lambda width, own=own: charts.histogram(own, width, span))
        caption = f"<figcaption>{escape(name)}{_outside(row['kl_histogram'])}</figcaption>" if len(rows) > 1 else ""
        lone = _outside(row["kl_histogram"]) if len(rows) == 1 else ""
        figures.append(f"<figure>{caption}{picture}{f'<p class=note>{lone.strip()}</p>' if lone else ''}</figure>")
    return _section("Divergence token by token", "".join(figures))


def _outside(histogram: dict[str, Any]) -> str:
    """What the picture leaves out."""
    found = [(histogram["below"], f"below {histogram['edges'][0]:g}"), (histogram["above"], f"over {histogram['edges'][-1]:g}")]
    words = [f"{_data(count, f'{count:,}')} tokens {where} not shown" for count, where in found if count]
    return f" <small>{', '.join(words)}</small>" if words else ""


def _layers(layers: list[Layer]) -> str:
    if not layers:
        return ""
    parts = []
    panels = charts.losses(layers)
    if panels:
        parts.append(
            _section(
                "Loss of each layer",
                f"<div class='panels'>{''.join(panels)}</div>",
                "Relative proxy loss tr(EHEᵀ)/tr(WHWᵀ) of each layer's rounding, by decoder block, log scale, the same in all "
                "panels; the broken line is the median of all layers, the larger dot the worst layer.",
            )
        )
    if any(layer.block is not None for layer in layers):
        parts.append(
            _section("Bits of each layer", charts.both_widths(lambda width: charts.bits(layers, width)), _bits(layers))
        )
    columns = [
        ("layer", lambda layer: escape(layer.name)),
        ("shape", lambda layer: f"{layer.shape[0]:,} &times; {layer.shape[1]:,}"),
        ("code", lambda layer: escape(layer.code)),
        ("bits", lambda layer: _data(layer.bits)),
        ("stored bits", lambda layer: _data(layer.bits_per_weight)),
        ("loss", lambda layer: _data(layer.loss)),
    ]
    return "".join(parts) + _folded(f"All {len(layers)} packed layers", _table(columns, layers))


def _bits(layers: list[Layer]) -> str:
    values = [layer.bits_per_weight for layer in layers if layer.block is not None]
    outside = [f"{escape(layer.name)} {_data(layer.bits_per_weight)}" for layer in layers if layer.block is None]
    span = f"from {_data(min(values))} to {_data(max(values))}" if max(values) > min(values) else f"{_data(values[0])} in all"
    besides = f" Outside of the blocks: {', '.join(outside)}." if outside else ""
    return f"Bits a weight as stored, scales and tables with it, {span}; darker is more.{besides}"


def _protocol(protocols: Sequence[dict[str, Any]]) -> str:
    rows = []
    for field, name in FIELDS.items():
        values = list(dict.fromkeys(each[field] for each in protocols))
        if values == [None]:
            continue
        rows.append(f"<div><dt>{name}</dt><dd>{'; '.join(escape(text_of(value)) for value in values)}</dd></div>")
    return f"<dl class='protocol'>{''.join(rows)}</dl>"


def _section(title: str, content: str, note: str = "") -> str:
    return f"<section><h2>{title}</h2>{content}{f'<p class=note>{note}</p>' if note else ''}</section>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _table(columns: Sequence[tuple[str, Any]], rows: Sequence[Any]) -> str:
    head = "".join(f"<th scope='col'>{name}</th>" for name, _ in columns)
    body = "".join(f"<tr>{''.join(f'<td>{cell(row)}</td>' for _, cell in columns)}</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _data(value: float | int | None, text: str | None = None) -> str:
    """A figure with all of its digits for a machine, and few for a person."""
    return "&ndash;" if value is None else f'<data value="{value!r}">{text or text_of(value)}</data>'


def _pair(value: float, error: float | None, times: float = 1, unit: str = "") -> str:
    """A figure and its standard error. times, unit: how both are shown; the machine's digits are those of the JSON."""
    text, error_text = WithError(value * times, None if error is None else error * times).parts()
    if error_text is not None:
        return f'{_data(value, text)} <span class="error">± {_data(error, error_text)}{unit}</span>'
    return f"{_data(value, text)}{unit}{'' if error is None else _data(error, ' ')}"


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="qtip {escape(qtipcli.__version__)}">
<link rel="icon" href="data:,">
<title>{escape(title)} &ndash; qtip eval</title>
<style>
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Written by qtip {escape(qtipcli.__version__)}</footer>
</body>
</html>
"""
