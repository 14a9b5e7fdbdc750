"""Owns the gradient of the table that HYB, HYB2 and `lut` read, given the gradient of the decoded matrix a strip at a time.

A weight is plus or minus one entry of the table, so the entry's gradient is the signed sum over its weights. Which entry and
which sign, the decoder itself tells: given a table that holds the numbers of its entries, it decodes to them.
Dimension key: O outputs, I inputs, R rows and V columns of the table.
"""

from collections.abc import Callable
from functools import lru_cache

import numba
import numpy as np
import torch

from qtipcli_kernels import codes
from qtipcli_kernels.decode import cpu, reference
from qtipcli_kernels.spec import TILE, SpecError, TrellisSpec
from qtipcli_kernels.threads import for_ranges

StripGradient = Callable[[slice], torch.Tensor]
"""Outputs of a strip -> the gradient of its decoded weights, float32 [outputs, I]; called top to bottom, each strip once."""

FIXED_POINT_BITS = 62
"""Bits of a signed 64-bit sum, without its sign and one more for the rounding of the largest value."""

PIECE_WEIGHTS = 1 << 18
"""Weights that a thread sums at a time: about 0.3 ms. Pieces depend on the shape alone, and so does the result."""

MAX_PIECES = 16
"""Partial sums of the table, float64: 32 MiB for the largest one."""


def entry_numbers(spec: TrellisSpec, device: torch.device | str = "cpu") -> torch.Tensor:
    """A table that holds the number of each of its entries, from 1 on so that each can bear a sign; float32 [R, V].

    The largest table, of 2^17 entries, stays far below 2^24, up to which float32 holds every whole number.
    """
    shape = codes.lut_shape(spec)
    if shape is None:
        raise SpecError(f"code {spec.code} reads no table")
    return torch.arange(1, shape[0] * shape[1] + 1, dtype=torch.float32, device=device).reshape(shape)


def lut_grad(gradient_of: StripGradient, trellis: torch.Tensor, spec: TrellisSpec, tile_rows: int) -> torch.Tensor:
    """The gradient of the table, float32 [R, V], on any device.

    gradient_of: see StripGradient. trellis: int32 [O/16, I/16 * words]. tile_rows: rows of tiles in a strip.
    Deterministic where scattered additions run in any order: within a strip whole numbers are added, in units of 2^-40 and less
    of the strip's largest gradient. A gradient that is not finite makes the whole table's NaN.
    """
    numbers = entry_numbers(spec, trellis.device)
    total = torch.zeros(numbers.numel(), dtype=torch.float64, device=trellis.device)
    for outputs, signed in reference.strips(trellis, spec, numbers, tile_rows):
        gradient = gradient_of(outputs).to(torch.float64) * signed.sign()
        largest = gradient.abs().amax()
        # Whatever the signs, no sum overflows: all weights of the strip may read the same entry.
        exponent = torch.frexp(largest)[1] - (FIXED_POINT_BITS - gradient.numel().bit_length())
        # frexp calls the exponent of what is not finite 0; the product with zero is NaN then, and 0 else.
        unit = torch.exp2(exponent.to(torch.float64)) + 0 * largest
        whole = (gradient / unit).round().to(torch.int64).reshape(-1)
        entry = signed.abs().to(torch.int64).reshape(-1) - 1
        total += torch.zeros_like(total, dtype=torch.int64).index_add_(0, entry, whole) * unit
    return total.to(torch.float32).reshape(numbers.shape)


def lut_grad_cpu(gradient_of: StripGradient, trellis: torch.Tensor, spec: TrellisSpec, tile_rows: int) -> torch.Tensor:
    """The contract of `lut_grad` on CPUs, on every core, summed in float64; NaN stays with the entries that it belongs to."""
    numbers = entry_numbers(spec)
    strip_weights = min(tile_rows, len(trellis)) * TILE * (trellis.shape[1] // spec.words_per_tile * TILE)
    pieces = max(1, min(MAX_PIECES, strip_weights // PIECE_WEIGHTS))
    sums, scatter = np.zeros((pieces, 2, numbers.numel() + 1)), scatterer()
    for outputs, signed in cpu.strips(trellis, spec, numbers, tile_rows):
        gradient, entry = (part.contiguous().numpy().reshape(-1) for part in (gradient_of(outputs), signed))
        for_ranges(pieces, 1, lambda start, stop, g=gradient, e=entry: scatter(start, stop, e, g, sums))
    plus, minus = sums.sum(axis=0)
    return torch.from_numpy((plus - minus)[1:].astype(np.float32)).reshape(numbers.shape)


@lru_cache
def scatterer():
    """The compiled signed sums: (start, stop, signed, gradient, sums in and out).

    start, stop: range of pieces. signed, gradient: float32, flat, of one length; signed is plus or minus an entry's number.
    sums: float64 [pieces, 2, R * V + 1], of weights with sign + and -: one look-up in place of a branch that is never foreseen.
    """

    @numba.njit(nogil=True, cache=True)
    def kernel(start, stop, signed, gradient, sums):
        pieces, _, width = sums.shape
        for piece in range(start, stop):
            own = sums[piece].reshape(-1)
            for index in range(signed.size * piece // pieces, signed.size * (piece + 1) // pieces):
                number = np.int64(signed[index])
                own[np.uint64(abs(number) + (number < 0) * width)] += gradient[index]

    return kernel
