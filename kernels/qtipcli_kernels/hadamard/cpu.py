"""Owns the orthonormal transform on CPUs: fast Walsh-Hadamard butterflies for 2^p, a small dense product for the rest."""

from functools import lru_cache

import numba
import numpy as np
import torch

from qtipcli_kernels.hadamard.factor import factor
from qtipcli_kernels.hadamard.reference import check_block
from qtipcli_kernels.threads import for_ranges

PIECE_VALUES = 1 << 16
"""Values that one thread transforms at a time, 0.1 ms: below this, handing work over costs more than it saves."""

MANY_BLOCKS = 64
"""From here on the dense factor is torch's: its threads then win more than starting them costs; for a token they do not."""


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """Transform the last dimension in blocks; the contract of `reference.hadamard`."""
    check_block(x, block)
    order, power_of_two = factor(block).dense.shape[0], factor(block).power_of_two
    rows = x.detach().contiguous().reshape(-1, power_of_two)
    out = torch.empty_like(rows)
    source, target = rows.numpy(), out.numpy()
    scale = source.dtype.type(1 / np.sqrt(power_of_two))
    per_piece = max(1, PIECE_VALUES // power_of_two)
    for_ranges(len(rows), per_piece, lambda start, stop: _butterflies(source, target, start, stop, scale))
    if order > 1:
        blocks = out.reshape(-1, order, power_of_two)
        dense = _dense(block, x.dtype, transpose)
        if len(blocks) >= MANY_BLOCKS:
            out = torch.matmul(dense, blocks)
        else:
            out = torch.zeros_like(blocks)
            _multiply(dense.numpy(), blocks.numpy(), out.numpy())
    return out.reshape(x.shape)


@lru_cache(maxsize=64)
def _dense(block: int, dtype: torch.dtype, transpose: bool) -> torch.Tensor:
    dense = factor(block).dense.to(dtype)
    return dense.T.contiguous() if transpose else dense


@numba.njit(nogil=True, cache=True)
def _butterflies(source, target, start, stop, scale):
    """target[start:stop] = the Walsh-Hadamard transform of each row of `source`, times `scale`.

    Two doublings in one pass over the row, the first two as it is copied; one more where the number of doublings is odd.
    """
    n = source.shape[1]
    for row in range(start, stop):
        values = target[row]
        if n < 4:
            for i in range(n):
                values[i] = source[row, i] * scale
        for i in range(0, n // 4 * 4, 4):
            a, b = source[row, i] * scale, source[row, i + 1] * scale
            c, d = source[row, i + 2] * scale, source[row, i + 3] * scale
            values[i], values[i + 1] = (a + b) + (c + d), (a - b) + (c - d)
            values[i + 2], values[i + 3] = (a + b) - (c + d), (a - b) - (c - d)
        width = 4 if n >= 4 else 1
        while 4 * width <= n:
            for first in range(0, n, 4 * width):
                quarter_0, quarter_1 = values[first : first + width], values[first + width : first + 2 * width]
                second = first + 2 * width
                quarter_2, quarter_3 = values[second : second + width], values[second + width : second + 2 * width]
                for i in range(width):
                    a, b, c, d = quarter_0[i], quarter_1[i], quarter_2[i], quarter_3[i]
                    quarter_0[i], quarter_1[i] = (a + b) + (c + d), (a - b) + (c - d)
                    quarter_2[i], quarter_3[i] = (a + b) - (c + d), (a - b) - (c - d)
            width *= 4
        if width < n:
            low, high = values[:width], values[width:]
            for i in range(width):
                a, b = low[i], high[i]
                low[i], high[i] = a + b, a - b


@numba.njit(nogil=True, cache=True, fastmath={"contract"})
def _multiply(dense, blocks, out):
    """out[n] += dense @ blocks[n], four rows of `blocks` in one pass over a row of `out`."""
    order = dense.shape[0]
    for n in range(len(blocks)):
        for i in range(order):
            total = out[n, i]
            for j in range(0, order // 4 * 4, 4):
                a, b, c, d = dense[i, j], dense[i, j + 1], dense[i, j + 2], dense[i, j + 3]
                row_0, row_1, row_2, row_3 = blocks[n, j], blocks[n, j + 1], blocks[n, j + 2], blocks[n, j + 3]
                for k in range(len(total)):
                    total[k] += (a * row_0[k] + b * row_1[k]) + (c * row_2[k] + d * row_3[k])
            for j in range(order // 4 * 4, order):
                a, row_0 = dense[i, j], blocks[n, j]
                for k in range(len(total)):
                    total[k] += a * row_0[k]
