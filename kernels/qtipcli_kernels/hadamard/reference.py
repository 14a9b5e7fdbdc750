"""Owns the orthonormal transform by definition: an explicit matrix product, block by block."""

import torch

from qtipcli_kernels.hadamard.factor import factor, sylvester
from qtipcli_kernels.spec import SpecError


def matrix(block: int) -> torch.Tensor:
    """The whole transform of one block, Q_M (x) H_{2^p}, float64 [block, block]."""
    parts = factor(block)
    return torch.kron(parts.dense, sylvester(parts.power_of_two))


def hadamard(x: torch.Tensor, block: int, transpose: bool = False) -> torch.Tensor:
    """Transform the last dimension in independent blocks: y = H x, or H^T x, the inverse, with `transpose`.

    x: float32 or float64 [..., n] with n a multiple of `block`. Returns the same shape and dtype.
    """
    check_block(x, block)
    turn = matrix(block).to(x.dtype).to(x.device)
    return (x.reshape(*x.shape[:-1], -1, block) @ (turn if transpose else turn.T)).reshape(x.shape)


def check_block(x: torch.Tensor, block: int) -> None:
    """Raise SpecError unless the last dimension of x is cut into whole blocks."""
    if x.ndim == 0 or block < 1 or x.shape[-1] % block:
        raise SpecError(f"a transform in blocks of {block} does not fit a tensor of shape {tuple(x.shape)}")
