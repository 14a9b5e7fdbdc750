"""Owns `qtip eval`: one model's figures, or several models' as one table; and what is drawn of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qtipcli.cli import dry_run as dry_runs
from qtipcli.cli import options
from qtipcli.cli.display import Display, WithError, print_json, print_table

SPLIT = 7
"""Columns of a comparison that stay together on a narrow terminal: those that say what to choose."""

ONE_SPLIT = 6
"""The same for one model's table: the text's length, and the means."""


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
    data: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, a .txt, .jsonl or .parquet file, or owner/name\\[:config] of the hub \\[wikitext2]."),
    ] = None,
    context: Annotated[
        list[str] | None,
        typer.Option(help="Tokens in each window, such as 2048; 2048,4096,8192 gives a row each \\[at most 2048]."),
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows from the start of the text \\[all; 256 of c4].", min=1)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 \\[float32 on a CPU].")] = None,
    noise_floor: Annotated[
        bool, typer.Option("--noise-floor", help="Run the original in a wider dtype too: what rounding alone costs.")
    ] = False,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="One decoder block in memory at a time \\[where whole models do not fit]."),
    ] = None,
    cache_gib: Annotated[
        float | None,
        typer.Option(help="Keep the original's logits up to so many GiB; it leaves memory then \\[--compare: 16].", min=0),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Keep them in this directory for later runs \\[a temporary file].", file_okay=False)
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Zero-shot tasks of lm-eval, such as arc_easy,piqa (pip install 'qtipcli\\[eval]')."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --compare: draw KL and perplexity over stored bits there, a .png file.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots there, one .html file for any browser.")] = None,
    against: Annotated[
        str | None, typer.Option(help="With --compare: the model that all others are compared to \\[each to the row above].")
    ] = None,
    trust_remote_code: options.Trust = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Measure a model on held-out text: perplexity with its protocol, and how far it is from the original."""
    from qtipcli.errors import SettingsError
    from qtipcli.stages.report import page

    if html is not None:
        page.check_target(html)
    contexts = options.whole_numbers("--context", context or [], least=2)
    shared = {"base": base, "data": data, "windows": windows, "dtype": dtype, "trust_remote_code": trust_remote_code}
    shared["stream"] = stream
    own = options.given(noise_floor=noise_floor or None, cache=cache, tasks=options.words(tasks or []) or None)
    if compare:
        for option in own:
            raise SettingsError(f"--{option.replace('_', '-')} is not for a comparison", "leave --compare out")
    else:
        for option in options.given(plot=plot, against=against):
            raise SettingsError(f"--{option} belongs to a comparison", "say --compare, and give several models")
    if dry_run:
        _dry_run(directories, as_json, contexts, cache_gib, against, compare, own, **shared)
        return
    if compare:
        found = _compare(directories, plot, as_json, contexts, against=against, cache_gib=cache_gib, **shared)
    else:
        found = _one(directories, as_json, contexts, cache_gib, own, **shared)
    if html is not None:
        page.write(found, html)


def _dry_run(
    directories: list[str],
    as_json: bool,
    contexts: list[int],
    cache_gib: float | None,
    against: str | None,
    compare: bool,
    own: dict[str, Any],
    trust_remote_code: bool,
    base: str | None,
    **shared: Any,
) -> None:
    asked = shared | {"contexts": contexts, "compare": compare} | {name: own[name] for name in own if name != "cache"}
    dry_runs.evaluate(directories, base, trust_remote_code, as_json, cache_gib, own.get("cache"), against, **asked)


def _one(
    directories: list[str], as_json: bool, contexts: list[int], cache_gib: float | None, own: dict[str, Any], **shared: Any
) -> dict[str, Any]:
    from qtipcli.errors import SettingsError
    from qtipcli.stages import card, measure

    if len(directories) > 1:
        raise SettingsError(f"{len(directories)} models are given and one is evaluated", "say --compare to compare them")
    keeping = measure.Keeping(cache_gib, own.pop("cache", None))
    with Display() as display:
        result = measure.run_all(directories[0], contexts=contexts, keeping=keeping, watcher=display, **own, **shared)
        found = result.as_json()
        for row in found["rows"]:
            card.record(directories[0], shared["base"], row, display)
    if as_json:
        print_json(found)
        return found
    print_table("", [_one_row(row) for row in found["rows"]], split=ONE_SPLIT)
    if "tasks" in found:
        print_table("zero-shot tasks", [_task_row(score) for score in found["tasks"]])
    if found["rows"][0]["bits_per_weight"] is not None:
        print(f"{found['rows'][0]['bits_per_weight']:.4g} bits per weight as stored")
    print("±: one standard error over windows; KL in nats, of the original to the model")
    for row in found["rows"]:
        _print_protocol(row["protocol"])
    return found


def _one_row(row: dict[str, Any]) -> dict[str, Any]:
    figures = {
        "context": row["protocol"]["context"],
        "tokens": row["tokens"],
        "perplexity": WithError(row["perplexity"], row["perplexity_stderr"]),
    }
    if row["kl_mean"] is None:
        return figures
    floor = {} if row["kl_noise_floor"] is None else {"noise floor": row["kl_noise_floor"]}
    return figures | {
        "ratio": WithError(row["perplexity_ratio"], row["perplexity_ratio_stderr"]),
        "KL": WithError(row["kl_mean"], row["kl_stderr"]),
        "top-1": WithError(row["top1_agreement"], row["top1_stderr"]),
        "KL median": row["kl_median"],
        "99 %": row["kl_p99"],
        "99.9 %": row["kl_p999"],
        "max": row["kl_max"],
        **floor,
        "original's perplexity": row["base_perplexity"],
    }


def _task_row(score: dict[str, Any]) -> dict[str, Any]:
    original = {} if score["base_value"] is None else {"original": WithError(score["base_value"], score["base_stderr"])}
    return {
        "task": score["task"],
        "metric": score["metric"] if score["filter"] == "none" else f"{score['metric']} ({score['filter']})",
        "score": WithError(score["value"], score["stderr"]),
        **original,
        "examples": score["examples"],
    }


def _compare(models: list[str], plot: Path | None, as_json: bool, contexts: list[int], **asked: Any) -> dict[str, Any]:
    from qtipcli.errors import SettingsError
    from qtipcli.stages import compare, plot_comparison
    from qtipcli.stages.plot import check_target

    if len(contexts) > 1:
        raise SettingsError(f"a comparison has one context, not {len(contexts)}", "compare once for each context")
    if plot is not None:
        check_target(plot)
    with Display() as display:
        report = compare.run(models, context=contexts[0] if contexts else None, watcher=display, **asked)
    if plot is not None:
        plot_comparison.draw(report, plot)
    if as_json:
        print_json(report)
        return report
    rows, original = report["rows"], report["base"]
    # With --against, the one row that is compared to none is the one that all others are compared to.
    other = next(row["label"] for row in rows if row["compared_to"] is None) if asked["against"] else "the row above"
    print_table("", [_table_row(row, f"KL less {other}") for row in rows], split=SPLIT)
    print(f"original {original['model']}: perplexity {WithError(original['perplexity'], original['perplexity_stderr'])}")
    print("front: no other row is as good in bits and KL and better in one of them")
    print("±: one standard error over windows; of KL differences the paired one, since all rows saw the same windows")
    _print_protocol(report["protocol"])
    return report


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
        "99.9 %": row["kl_p999"],
        "max": row["kl_max"],
        "top-1": WithError(row["top1_agreement"], row["top1_stderr"]),
    }


def _print_protocol(protocol: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in protocol.items() if value is not None))
