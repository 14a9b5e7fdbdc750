"""Owns the benchmark of the packed product: against torch's dense 16-bit product of the same matrix, in turns in one run.

Dimension key: B rows of x, O outputs, I inputs of the matrix as the model sees it; P outputs, J inputs padded to whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from qtipcli.errors import SettingsError
from qtipcli.quant.transform import padded
from qtipcli.stages import limits, timing
from qtipcli.stages.bench import SEED, chosen_device, chosen_dtype, device_name
from qtipcli.stages.progress import Silent, Watcher
from qtipcli.stages.sizes import Matrix
from qtipcli_kernels import codes as code_definitions
from qtipcli_kernels import device as kernel_device
from qtipcli_kernels import dispatch, packing
from qtipcli_kernels.decode import reference
from qtipcli_kernels.spec import TILE, SpecError, TrellisSpec

LARGEST_ERROR = 2.0
"""Most error allowed against float64, in units of torch's own product in x's dtype."""

TABLE_COLUMNS = (
    "layer", "shape", "code", "bits", "batch", "microseconds", "GB_per_s", "bandwidth_share",
    "baseline_microseconds", "ratio", "error", "implementation",
)  # fmt: skip
"""Of a row, what fits a terminal."""


def run(
    matrices: Sequence[Matrix] = (Matrix((4096,), 4096),),
    codes: tuple[str, ...] = ("1mad", "mul1", "3inst", "hyb"),
    bits: tuple[float, ...] = (2.0,),
    batches: tuple[int, ...] = (1,),
    state_bits: int = 16,
    seconds: float = 2.0,
    device: str | None = None,
    dtype: str | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Median times of x W^T from packed random walks and from a dense W.

    batches: rows of x. seconds: measuring time of one row. device: None is a GPU where there is one, else the CPU. dtype: of x;
    None is float16 on a GPU and float32 on a CPU. The dense product is in the same dtype; for float32 it is in bfloat16 and, a
    second time, in float32.

    Returns {"device", "dtype", "copy", "lane_operations_per_s", "timing", "notes", "wrong", "rows"}. A row holds layer, shape,
    padded, code, bits, state_bits, batch, microseconds, GB_per_s (of packed words), bandwidth_share (of `copy`), weights_per_s,
    limit_share (of what the device's instruction rate allows, or None), from_memory (False: the last cache held some of it),
    baseline, baseline_microseconds, ratio (baseline over packed), for float32 also float32_microseconds and float32_ratio,
    error (over torch's, against float64), implementation. Where the product is wrong, every speed is None and "wrong" says so.

    Raises SettingsError for what cannot be measured.
    """
    where = chosen_device(device)
    kind = chosen_dtype(dtype, where)
    if not batches or min(batches) < 1:
        raise SettingsError("there are no rows of x to multiply", "give batches of 1 or more")
    try:
        specs = [TrellisSpec.at_bits(code, rate, state_bits) for code in codes for rate in bits]
    except SpecError as error:
        raise SettingsError(str(error), "qtip bench matvec --help") from error
    watcher = watcher or Silent()
    watcher.begin("matvec", len(matrices) * len(specs) * len(batches))
    report: dict[str, Any] = {
        "device": device_name(where),
        "dtype": str(kind).removeprefix("torch."),
        "copy": limits.copy_bandwidth(where),
        "lane_operations_per_s": limits.lane_operations(where),
        "timing": "",
        "notes": _notes(where),
        "wrong": [],
        "rows": [],
    }
    for matrix in matrices:
        for spec in specs:
            _measure(report, matrix, spec, batches, seconds, where, kind, watcher)
    return report


def _notes(device: torch.device) -> list[str]:
    """What a reader of the speeds must know: that no kernel served them, and why."""
    if dispatch.implementation(device) != "reference":
        return []
    return [f"served by the slow reference, not by a kernel: {kernel_device.why_not(device) or 'none is written for it'}"]


@torch.no_grad()
def _measure(
    report: dict[str, Any],
    matrix: Matrix,
    spec: TrellisSpec,
    batches: tuple[int, ...],
    seconds: float,
    device: torch.device,
    dtype: torch.dtype,
    watcher: Watcher,
) -> None:
    """Add one row a batch to `report`: first all products are checked against float64, then the right ones are timed."""
    case = Case.draw(matrix, spec, device, dtype)
    xs = [case.x(batch, dtype) for batch in batches]
    found = [dispatch.matvec(x, case.trellis, spec, case.lut) for x in xs]
    errors = case.check(found, xs)
    del found
    for x, error in zip(xs, errors, strict=True):
        row = _row(matrix, spec, len(x), error, device)
        if error <= LARGEST_ERROR:
            row |= _speeds(case, x, seconds, report)
        else:
            report["wrong"].append(
                f"the packed product of {spec.code} at {spec.bits:g} bits, {matrix.shape}, batch {len(x)}, is wrong by "
                f"{error:.3g} times torch's error"
            )
        report["rows"].append(row)
        speed = f"{row['microseconds']:.1f} us" if row["microseconds"] else "WRONG, no speed is given"
        watcher.advance(f"{matrix.layer} {matrix.shape} {spec.code} {spec.bits:g} bits, batch {len(x)}: {speed}".strip())


def _row(matrix: Matrix, spec: TrellisSpec, batch: int, error: float, device: torch.device) -> dict[str, Any]:
    return {
        "layer": matrix.layer,
        "shape": matrix.shape,
        "padded": "{}x{}".format(*matrix.padded),
        "code": spec.code,
        "bits": spec.bits,
        "state_bits": spec.state_bits,
        "batch": batch,
        "error": error if math.isfinite(error) else None,
        "implementation": dispatch.implementation(device),
        **dict.fromkeys(("microseconds", "GB_per_s", "bandwidth_share", "weights_per_s", "limit_share", "from_memory")),
        **dict.fromkeys(("baseline", "baseline_microseconds", "ratio")),
    }


@dataclass
class Case:
    """A random packed matrix and, once it was checked, the dense ones of the same weights, which torch multiplies.

    trellis: int32, [P, J] packed. kept_P: bool, the outputs that are no padding. half_OI: the baseline's, 16 bits.
    float_OI: the second baseline's on a CPU, float32, else None.
    """

    matrix: Matrix
    spec: TrellisSpec
    trellis: torch.Tensor
    lut: torch.Tensor | None
    kept_P: torch.Tensor
    half_OI: torch.Tensor
    float_OI: torch.Tensor | None

    @classmethod
    def draw(cls, matrix: Matrix, spec: TrellisSpec, device: torch.device, dtype: torch.dtype) -> Case:
        """Any bits are a walk: every ring of the right length is tail-biting."""
        draw = torch.Generator(device).manual_seed(SEED)
        shape = packing.trellis_shape(*matrix.padded, spec)
        trellis = torch.empty(shape, dtype=torch.int32, device=device).random_(-(2**31), 2**31 - 1, generator=draw)
        lut = code_definitions.default_lut(spec)
        kept = torch.cat([torch.arange(padded(part)) < part for part in matrix.parts]).to(device)
        half = torch.bfloat16 if dtype == torch.float32 else dtype
        sizes = (matrix.outputs, matrix.inputs)
        half_OI = torch.empty(sizes, dtype=half, device=device)
        float_OI = torch.empty(sizes, device=device) if dtype == torch.float32 else None
        return cls(matrix, spec, trellis, None if lut is None else lut.to(device), kept, half_OI, float_OI)

    def x(self, batch: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows of N(0, 1), [B, J]; zero where the inputs are padding, as a layer pads them."""
        draw = torch.Generator(self.trellis.device).manual_seed(SEED)
        inputs = self.matrix.inputs
        rows = torch.randn(batch, inputs, generator=draw, device=self.trellis.device).to(dtype)
        return functional.pad(rows, (0, self.matrix.padded[1] - inputs))

    def check(self, found: Sequence[torch.Tensor], xs: Sequence[torch.Tensor]) -> list[float]:
        """Error of each product [B, P] of rows [B, J] against float64, in units of the error of torch's product in x's dtype.

        The matrix comes by definition, a strip at a time: the oracle must not share code with what is measured, and neither a
        whole float32 nor a whole float64 matrix need fit. What it decodes is kept in the dtypes that are timed.
        """
        found = [product[:, self.kept_P] for product in found]
        xs = [x[:, : self.matrix.inputs] for x in xs]
        squares = torch.zeros(len(xs), 2, dtype=torch.float64, device=self.trellis.device)
        first = 0
        tile_rows = max(1, dispatch.STRIP_WEIGHTS // (self.matrix.padded[1] * TILE))
        for outputs, strip_PJ in reference.strips(self.trellis, self.spec, self.lut, tile_rows):
            strip = strip_PJ[self.kept_P[outputs], : self.matrix.inputs]
            place = slice(first, first + len(strip))
            first += len(strip)
            self.half_OI[place] = strip
            if self.float_OI is not None:
                self.float_OI[place] = strip
            for number, (x, product) in enumerate(zip(xs, found, strict=True)):
                exact = x.double() @ strip.double().T
                plain = functional.linear(x, strip.to(x.dtype))
                squares[number, 0] += (product[:, place] - exact).square().sum()
                squares[number, 1] += (plain - exact).square().sum()
        tiny = torch.finfo(torch.float64).tiny
        return (squares[:, 0] / squares[:, 1].clamp(min=tiny)).sqrt().tolist()


def _speeds(case: Case, x: torch.Tensor, seconds: float, report: dict[str, Any]) -> dict[str, Any]:
    """Time one row, packed and dense in turns."""
    device, cache = x.device, limits.last_cache_bytes(x.device)
    trellises = copies(case.trellis, cache)
    packed = [partial(dispatch.matvec, x, trellis, case.spec, case.lut) for trellis in trellises]
    narrow = x[:, : case.matrix.inputs].to(case.half_OI.dtype).contiguous()
    rotations = [packed, [partial(functional.linear, narrow, half) for half in copies(case.half_OI, cache)]]
    if case.float_OI is not None:
        wide = x[:, : case.matrix.inputs].float().contiguous()
        rotations.append([partial(functional.linear, wide, case.float_OI)])
    timings = timing.medians(rotations, seconds, device)
    report["timing"] = timings.how
    microseconds, baseline, *wide_microseconds = timings.microseconds
    packed_bytes = case.trellis.numel() * case.trellis.element_size()
    weights_per_s = case.matrix.outputs * case.matrix.inputs / microseconds * 1e6
    limit = limits.weights_limit(case.spec.code, report["lane_operations_per_s"])
    speeds = {
        "microseconds": microseconds,
        "GB_per_s": packed_bytes / microseconds / 1e3,
        "bandwidth_share": packed_bytes / microseconds / 1e3 / report["copy"]["GB_per_s"],
        "weights_per_s": weights_per_s,
        "limit_share": weights_per_s / limit if limit else None,
        "from_memory": len(trellises) * packed_bytes >= timing.CACHE_MULTIPLE * cache if cache else None,
        "baseline": str(case.half_OI.dtype).removeprefix("torch."),
        "baseline_microseconds": baseline,
        "ratio": baseline / microseconds,
    }
    for spent in wide_microseconds:
        speeds |= {"float32_microseconds": spent, "float32_ratio": spent / microseconds}
    return speeds


def copies(matrix: torch.Tensor, cache_bytes: int) -> list[torch.Tensor]:
    """`matrix` and as many copies as keep it out of the cache."""
    needed = timing.copies_needed(matrix.numel() * matrix.element_size(), cache_bytes)
    return list(matrix.repeat(needed, 1, 1)) if needed > 1 else [matrix]
