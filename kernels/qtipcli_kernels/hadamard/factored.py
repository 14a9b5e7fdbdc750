"""Owns the orthonormal transform by its factors in plain torch: for float64 on a GPU (Hessians), which no kernel computes."""

import torch

from qtipcli_kernels.hadamard.factor import factor
from qtipcli_kernels.hadamard.reference import check_block


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """The contract of `reference.hadamard`, in n log n steps and without the matrix, which can be larger than x."""
    check_block(x, block)
    parts = factor(block)
    order, power = len(parts.dense), parts.power_of_two
    dense = parts.dense.to(x.device, x.dtype)
    y = x.reshape(-1, order, power)
    if order > 1:
        y = (dense.T if transpose else dense) @ y
    width = 1
    while width < power:
        pairs = y.reshape(-1, power // (2 * width), 2, width)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        width *= 2
    return (y * power**-0.5).reshape(x.shape)
