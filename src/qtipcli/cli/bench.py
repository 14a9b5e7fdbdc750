"""Owns `qtip bench`: measurements that print ratios taken in one run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from qtipcli.cli import options
from qtipcli.cli.display import Display, print_json, print_table, text_of

bench_app = typer.Typer(help="Measure codes, encoder, product and whole models on this machine.", no_args_is_help=True)

Codes = Annotated[str | None, typer.Option(help="Codes, separated by commas.")]
Bits = Annotated[str | None, typer.Option(help="Bits per weight, separated by commas.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N \\[a GPU where there is one].")]
StateBits = Annotated[int, typer.Option(help="L of the trellis, 8 to 16.", min=8, max=16)]


@bench_app.command()
def distortion(
    codes: Codes = None,
    bits: Bits = None,
    tiles: Annotated[int, typer.Option(help="Gaussian tiles of 256 weights.", min=2)] = 512,
    state_bits: StateBits = 16,
    scales: Annotated[bool, typer.Option("--scales", help="Try scales around the table's and keep the best.")] = False,
    as_json: options.Json = False,
) -> None:
    """Mean squared error of each code on Gaussian weights, against the rate-distortion bound."""
    from qtipcli.stages import bench

    with Display() as display:
        _show(bench.distortion(_words(codes), _numbers(bits), tiles, state_bits, scales, display), as_json)


@bench_app.command()
def encode(
    code: Annotated[str, typer.Option(help="Code to encode with.")] = "1mad",
    bits: Annotated[float, typer.Option(help="Bits per weight.")] = 2.0,
    state_bits: StateBits = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    as_json: options.Json = False,
) -> None:
    """Weights per second of the encoder, on a CPU against the textbook formulation in one run; and its peak memory."""
    from qtipcli.stages import bench

    _show(bench.encode(code, bits, state_bits, device), as_json)


@bench_app.command()
def matvec(
    codes: Codes = None,
    bits: Bits = None,
    shape: Annotated[str | None, typer.Option(help="OUTPUTSxINPUTS, several separated by commas [4096x4096].")] = None,
    model: Annotated[str | None, typer.Option(help="The layers of a known model instead, such as llama-3.1-8b.")] = None,
    batches: Annotated[str, typer.Option(help="Rows of x, separated by commas.")] = "1",
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="Of x: float16 or bfloat16 on a GPU, float32 or bfloat16 on a CPU.")] = None,
    seconds: Annotated[float, typer.Option(help="Measuring time of a row.", min=0.01)] = 2.0,
    plot: Annotated[Path | None, typer.Option(help="Draw a roofline there, a .png file.")] = None,
    as_json: options.Json = False,
) -> None:
    """Product with packed matrices, against torch's dense 16-bit product and the bandwidth of memory, in one run."""
    from qtipcli.errors import QtipError, SettingsError
    from qtipcli.stages import bench, bench_matvec
    from qtipcli.stages import plot as plots
    from qtipcli.stages.sizes import Matrix, sizes_of

    if shape is not None and model is not None:
        raise SettingsError("--shape and --model both say what to multiply", "give one of them")
    if plot is not None:
        plots.check_target(plot)
    sizes = [bench.parse_shape(each) for each in (shape or "4096x4096").split(",")]
    matrices = sizes_of(model).matrices() if model else tuple(Matrix((outputs,), inputs) for outputs, inputs in sizes)
    chosen: dict[str, Any] = options.given(codes=_words(codes), bits=_numbers(bits))
    with Display() as display:
        report = bench_matvec.run(
            matrices, batches=_whole_numbers(batches), seconds=seconds, device=device, dtype=dtype, watcher=display, **chosen
        )
    _show(report, as_json, [name for name in bench_matvec.TABLE_COLUMNS if model or name != "layer"])
    if report["wrong"]:
        raise QtipError("; ".join(report["wrong"]) + ": no speed is given", "report this as a bug")
    if plot is not None:
        plots.roofline(report, plot)


@bench_app.command()
def model(
    directory: Annotated[str | None, typer.Argument(help="A packed directory or hub name.", show_default=False)] = None,
    against: Annotated[str | None, typer.Option(help="The unquantized model \\[the packed weights, decoded].")] = None,
    random: Annotated[
        str | None, typer.Option(help="Instead: random weights in the sizes of a known model or of a config.json.")
    ] = None,
    code: Annotated[str, typer.Option(help="Code of the random model.")] = "hyb",
    bits: Annotated[float, typer.Option(help="Bits per weight of the random model.")] = 2.0,
    state_bits: StateBits = 16,
    transform: Annotated[str, typer.Option(help="Of the random model: full or block-128.")] = "full",
    prompts: Annotated[str, typer.Option(help="Tokens of each prefill, separated by commas.")] = "512,2048",
    tokens: Annotated[int, typer.Option(help="Tokens to decode.", min=1)] = 64,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float16, bfloat16 or float32 \\[its own; on a CPU bfloat16].")] = None,
    seconds: Annotated[float, typer.Option(help="Measuring time of a row.", min=0.01)] = 2.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Decode through torch.compile; takes minutes to begin.")] = False,
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="CUDA graphs, on a GPU.")] = True,
    baseline: Annotated[bool, typer.Option("--baseline/--no-baseline", help="Measure the plain model, too.")] = True,
    as_json: options.Json = False,
) -> None:
    """Prefill and decode speed and memory of a whole packed model, against the plain one, in one run."""
    from qtipcli.stages import bench, bench_model

    asked = bench_model.Asked(_whole_numbers(prompts), tokens, seconds, graphs, compiled, baseline)
    how = bench.packing_of(code, bits, state_bits, transform)
    with Display() as display:
        report = bench_model.run(directory, against, random, *how, device=device, dtype=dtype, asked=asked, watcher=display)
    _show(report, as_json)


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(","))


def _numbers(text: str | None) -> tuple[float, ...] | None:
    from qtipcli.errors import SettingsError

    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{text!r} is not a list of numbers", "separate them by commas, as in 2,3,4") from error


def _whole_numbers(text: str) -> tuple[int, ...]:
    from qtipcli.errors import SettingsError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{text!r} is not a list of whole numbers", "separate them by commas, as in 1,4,16") from error


def _show(report: dict[str, Any], as_json: bool, columns: Iterable[str] | None = None) -> None:
    if as_json:
        print_json(report)
        return
    print_table("", report["rows"], columns)
    for name in ("device", "dtype", "model", "original", "bits_per_weight", "implementation", "timing"):
        if report.get(name):
            print(f"{name.replace('_', ' ')}: {text_of(report[name])}")
    if "copy" in report:
        print(f"bandwidth: {report['copy']['GB_per_s']:.4g} GB/s, {report['copy']['how']}")
    for note in report.get("notes", ()):
        print(f"note: {note}")
