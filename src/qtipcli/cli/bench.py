"""Owns `qtip bench`: measurements that print ratios taken in one run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qtipcli.cli import options
from qtipcli.cli.display import Display, print_json, print_table

bench_app = typer.Typer(help="Measure distortion, encoder speed and product speed on this machine.", no_args_is_help=True)

Codes = Annotated[str | None, typer.Option(help="Codes, separated by commas.")]
Bits = Annotated[str | None, typer.Option(help="Bits per weight, separated by commas.")]
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
    as_json: options.Json = False,
) -> None:
    """Weights per second of the encoder, against the textbook formulation in torch, in one run; and its peak memory."""
    from qtipcli.stages import bench

    _show(bench.encode(code, bits, state_bits), as_json)


@bench_app.command()
def matvec(
    codes: Codes = None,
    bits: Bits = None,
    shape: Annotated[str, typer.Option(help="OUTPUTSxINPUTS.")] = "4096x4096",
    batches: Annotated[str, typer.Option(help="Rows of x, separated by commas.")] = "1",
    as_json: options.Json = False,
) -> None:
    """Product with a packed matrix, against torch's dense bfloat16 product, in one run."""
    from qtipcli.stages import bench, bench_matvec

    rows, columns = bench.parse_shape(shape)
    chosen: dict[str, Any] = options.given(codes=_words(codes), bits=_numbers(bits))
    batch_sizes = tuple(int(batch) for batch in _numbers(batches) or ())
    _show(bench_matvec.run(shapes=((rows, columns),), batches=batch_sizes, **chosen), as_json)


def _words(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(","))


def _numbers(text: str | None) -> tuple[float, ...] | None:
    from qtipcli.errors import SettingsError

    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingsError(f"{text!r} is not a list of numbers", "separate them by commas, as in 2,3,4") from error


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    print_table("", report["rows"])
    print(f"device: {report['device']}")
