"""Owns the orthonormal transform on CPUs: fast Walsh-Hadamard butterflies for 2^p, a small dense product for the rest."""

from functools import lru_cache

import numba
import numpy as np
import torch

from qtipcli_kernels.hadamard.factor import factor
from qtipcli_kernels.hadamard.reference import check_block
from qtipcli_kernels.threads import for_ranges

PIECE_VALUES = 1 << 16
"""Values that one thread transforms at a time: below this, handing work over costs more than it saves."""


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """Transform the last dimension in blocks; the contract of `reference.hadamard`."""
    check_block(x, block)
    order, power_of_two = factor(block).dense.shape[0], factor(block).power_of_two
    rows = x.contiguous().reshape(-1, power_of_two)
    out = torch.empty_like(rows)
    source, target = rows.numpy(), out.numpy()
    scale = source.dtype.type(1 / np.sqrt(power_of_two))
    per_piece = max(1, PIECE_VALUES // power_of_two)
    for_ranges(len(rows), per_piece, lambda start, stop: _butterflies(source, target, start, stop, scale))
    if order > 1:
        out = torch.matmul(_dense(block, x.dtype, transpose), out.reshape(-1, order, power_of_two))
    return out.reshape(x.shape)


@lru_cache(maxsize=64)
def _dense(block: int, dtype: torch.dtype, transpose: bool) -> torch.Tensor:
    dense = factor(block).dense.to(dtype)
    return dense.T.contiguous() if transpose else dense


@numba.njit(nogil=True, cache=True)
def _butterflies(source, target, start, stop, scale):
    """target[start:stop] = the Walsh-Hadamard transform of each row of `source`, times `scale`."""
    n = source.shape[1]
    for row in range(start, stop):
        values = target[row]
        for i in range(n):
            values[i] = source[row, i] * scale
        half = 1
        while half < n:
            for first in range(0, n, 2 * half):
                low, high = values[first : first + half], values[first + half : first + 2 * half]
                for i in range(half):
                    a, b = low[i], high[i]
                    low[i] = a + b
                    high[i] = a - b
            half *= 2
