"""Owns `qtip eval`: one model's figures, or several models' as one table and one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qtipcli.cli import options
from qtipcli.cli.display import Display, WithError, print_json, print_table

SPLIT = 7
"""Columns of a comparison that stay together on a narrow terminal: those that say what to choose."""


def evaluate(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIRECTORY...",
            help="A packed directory, or any causal language model; several with --compare.",
            show_default=False,
        ),
    ],
    compare: Annotated[bool, typer.Option("--compare", help="Compare several models on the same windows.")] = False,
    base: Annotated[str | None, typer.Option(help="The original model: adds KL divergence, top-1 agreement and ratio.")] = None,
    data: options.Data = None,
    context: Annotated[int | None, typer.Option(help="Tokens in each window \\[the model's own, at most 2048].", min=2)] = None,
    windows: Annotated[int | None, typer.Option(help="Windows from the start of the text \\[all].", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 \\[float32 on a CPU].")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --compare: draw KL and perplexity over stored bits there, a .png file.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="With --compare: the model that all others are compared to \\[each to the row above].")
    ] = None,
    cache_gib: Annotated[
        float | None, typer.Option(help="With --compare: temporary file for the original's logits, GiB at most [16].", min=0)
    ] = None,
    trust_remote_code: options.Trust = False,
    as_json: options.Json = False,
) -> None:
    """Measure a model on held-out text: perplexity with its protocol, and how far it is from the original."""
    if compare:
        _compare(
            directories, plot, as_json, base=base, data=data, context=context, windows=windows, dtype=dtype,
            trust_remote_code=trust_remote_code, against=against, cache_gib=cache_gib,
        )  # fmt: skip
        return
    from qtipcli.errors import SettingsError
    from qtipcli.stages import card, measure

    if len(directories) > 1:
        raise SettingsError(f"{len(directories)} models are given and one is evaluated", "say --compare to compare them")
    for option in options.given(plot=plot, against=against, cache_gib=cache_gib):
        raise SettingsError(f"--{option.replace('_', '-')} belongs to a comparison", "say --compare, and give several models")
    with Display() as display:
        result = measure.run(directories[0], base, data, context, windows, dtype, trust_remote_code, display).as_json()
        card.record(directories[0], base, result, display)
    if as_json:
        print_json(result)
        return
    protocol = result.pop("protocol")
    print_table("", [{"figure": name, "value": value} for name, value in result.items() if value is not None])
    _print_protocol(protocol)


def _compare(models: list[str], plot: Path | None, as_json: bool, **asked: Any) -> None:
    from qtipcli.stages import compare, plot_comparison
    from qtipcli.stages.plot import check_target

    if plot is not None:
        check_target(plot)
    with Display() as display:
        report = compare.run(models, watcher=display, **asked)
    if plot is not None:
        plot_comparison.draw(report, plot)
    if as_json:
        print_json(report)
        return
    rows, original = report["rows"], report["base"]
    # With --against, the one row that is compared to none is the one that all others are compared to.
    other = next(row["label"] for row in rows if row["compared_to"] is None) if asked["against"] else "the row above"
    print_table("", [_table_row(row, f"KL less {other}") for row in rows], split=SPLIT)
    print(f"original {original['model']}: perplexity {WithError(original['perplexity'], original['perplexity_stderr'])}")
    print("front: no other row is as good in bits and KL and better in one of them")
    print("±: one standard error over windows; of KL differences the paired one, since all rows saw the same windows")
    _print_protocol(report["protocol"])


def _table_row(row: dict[str, Any], step: str) -> dict[str, Any]:
    difference = row["kl_difference"]
    return {
        "model": row["label"],
        "bits": row["bits_per_weight"],
        "MB": row["size_MB"],
        "perplexity": WithError(row["perplexity"], row["perplexity_stderr"]),
        "ratio": WithError(row["perplexity_ratio"], row["perplexity_ratio_stderr"]),
        "KL": WithError(row["kl_mean"], row["kl_stderr"]),
        "front": row["pareto"],
        step: None if difference is None else WithError(difference, row["kl_difference_stderr"]),
        "median": row["kl_median"],
        "99 %": row["kl_p99"],
        "max": row["kl_max"],
        "top-1": row["top1_agreement"],
    }


def _print_protocol(protocol: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in protocol.items() if value is not None))
