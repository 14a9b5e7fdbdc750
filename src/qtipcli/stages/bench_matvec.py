"""Owns the benchmark of the packed product: against torch's dense bfloat16 product of the same shape, in turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from qtipcli.errors import QtipError, SettingsError
from qtipcli.stages.bench import SEED, device_name
from qtipcli_kernels import codes as code_definitions
from qtipcli_kernels import dispatch, packing
from qtipcli_kernels.decode import reference
from qtipcli_kernels.spec import TILE, SpecError, TrellisSpec

CALLS_IN_TURN = 4
"""Calls of one product before the other's turn; the first is not counted, it runs while the other's threads still spin."""

LARGEST_ERROR = 2.0
"""Most error allowed against float64, in units of torch's own float32 product's."""

Product = Callable[[], torch.Tensor]


def run(
    shapes: tuple[tuple[int, int], ...] = ((4096, 4096),),
    codes: tuple[str, ...] = ("1mad", "mul1", "3inst", "hyb"),
    bits: tuple[float, ...] = (2.0,),
    batches: tuple[int, ...] = (1,),
    state_bits: int = 16,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Median times of x W^T from packed random walks and from a dense W.

    shapes: (outputs, inputs), multiples of 16. batches: rows of x. seconds: measuring time of one row.
    Returns {"device", "rows"}: code, bits, state_bits, shape, batch, microseconds, baseline_microseconds (bfloat16),
    float32_microseconds, ratio (baseline over packed), float32_ratio, error (over torch's float32 error, against float64).
    Raises SettingsError for what cannot be measured; QtipError, and gives no speed, where the packed product is wrong.
    """
    for outputs, inputs in shapes:
        if outputs < TILE or inputs < TILE or outputs % TILE or inputs % TILE:
            raise SettingsError(f"a packed matrix of {outputs}x{inputs} has no whole tiles", f"give multiples of {TILE}")
    if not batches or min(batches) < 1:
        raise SettingsError("there are no rows of x to multiply", "give batches of 1 or more")
    try:
        specs = [TrellisSpec.at_bits(code, rate, state_bits) for code in codes for rate in bits]
    except SpecError as error:
        raise SettingsError(str(error), "qtip bench matvec --help") from error
    rows = [row for shape in shapes for spec in specs for row in _rows(shape, spec, batches, seconds)]
    return {"device": device_name(), "rows": rows}


def _rows(shape: tuple[int, int], spec: TrellisSpec, batches: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    outputs, inputs = shape
    draw = torch.Generator().manual_seed(SEED)
    lut = code_definitions.default_lut(spec)
    # Any bits are a walk: every ring of the right length is tail-biting.
    trellis_shape = packing.trellis_shape(outputs, inputs, spec)
    trellis = torch.randint(-(2**31), 2**31, trellis_shape, dtype=torch.int64, generator=draw).to(torch.int32)
    weight_OI = _decoded(trellis, spec, lut)
    half_OI = weight_OI.to(torch.bfloat16)
    rows = []
    for batch in batches:
        x = torch.randn(batch, inputs, generator=draw)
        error = _relative_error(dispatch.matvec(x, trellis, spec, lut), x, weight_OI)
        if not error <= LARGEST_ERROR:
            raise QtipError(
                f"the packed product of {spec.code} at {spec.bits:g} bits is wrong by {error:.3g} times torch's float32 error: "
                "no speed is given",
                "report this as a bug",
            )
        half_x = x.to(torch.bfloat16)
        packed_us, half_us, float_us = _medians(
            (
                lambda x=x: dispatch.matvec(x, trellis, spec, lut),
                lambda half_x=half_x: functional.linear(half_x, half_OI),
                lambda x=x: functional.linear(x, weight_OI),
            ),
            seconds,
        )
        rows.append(
            {
                "code": spec.code,
                "bits": spec.bits,
                "state_bits": spec.state_bits,
                "shape": f"{outputs}x{inputs}",
                "batch": batch,
                "microseconds": packed_us,
                "baseline_microseconds": half_us,
                "float32_microseconds": float_us,
                "ratio": half_us / packed_us,
                "float32_ratio": float_us / packed_us,
                "error": error,
            }
        )
    return rows


def _decoded(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None) -> torch.Tensor:
    """The matrix by definition: the oracle must not share code with what is measured. A strip at a time bounds its memory."""
    tile_rows = max(1, dispatch.STRIP_WEIGHTS // (trellis.shape[1] // spec.words_per_tile * TILE * TILE))
    return torch.cat([strip for _, strip in reference.strips(trellis, spec, lut, tile_rows)])


def _relative_error(found: torch.Tensor, x: torch.Tensor, weight_OI: torch.Tensor) -> float:
    """Error of `found` against float64, in units of the error of torch's float32 product."""
    exact = x.double() @ weight_OI.double().T
    plain = (functional.linear(x, weight_OI) - exact).norm()
    return float((found - exact).norm() / plain.clamp(min=torch.finfo(torch.float32).tiny))


def _medians(products: tuple[Product, ...], seconds: float) -> list[float]:
    """Median microseconds of each, measured in turns so that what else the machine does strikes all of them."""
    times: list[list[float]] = [[] for _ in products]
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or not times[-1]:
        for product, spent in zip(products, times, strict=True):
            for call in range(CALLS_IN_TURN):
                started = time.perf_counter()
                product()
                if call:
                    spent.append((time.perf_counter() - started) * 1e6)
    return [statistics.median(spent) for spent in times]
