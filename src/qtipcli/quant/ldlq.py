"""Owns BlockLDLQ: rounding a matrix block column by block column, each with the error of the later ones fed back.

Source: QuIP# (arXiv 2402.04396), section 4, on QTIP's tiles of 16 x 16. Dimension key: O outputs, I inputs, B = 16 columns.
"""

from collections.abc import Callable

import torch

from qtipcli_kernels.packing import matrix_from_tiles, tiles_from_matrix
from qtipcli_kernels.spec import TILE

RoundTiles = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""float32 tiles [N, 256] in walk order -> (states int32 [N, T], the values they decode to, float32 [N, 256])."""


def block_ldl(cholesky_II: torch.Tensor) -> torch.Tensor:
    """The unit block-lower-triangular L of H = L D L^T, from H's Cholesky factor; float64 [I, I].

    With C = L blockdiag(C_jj), column block j of L is column block j of C times the inverse of C_jj.
    """
    lower = torch.empty_like(cholesky_II)
    for start in range(0, len(cholesky_II), TILE):
        block = slice(start, start + TILE)
        lower[:, block] = torch.linalg.solve_triangular(
            cholesky_II[block, block], cholesky_II[:, block], upper=False, left=False
        )
        lower[:start, block] = 0.0
        lower[block, block] = torch.eye(TILE, dtype=lower.dtype, device=lower.device)
    return lower


def round_ldlq(weight_OI: torch.Tensor, lower_II: torch.Tensor, round_tiles: RoundTiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `weight_OI` (float32 [O, I], both multiples of 16) under the Hessian whose block factor is `lower_II`.

    From the last block column to the first, block j is rounded as W_j + (W - W^)_{>j} L_{>j, j}, which minimises
    tr((W - W^) H (W - W^)^T) greedily.
    Returns (states int32 [O/16, I/16, T], rounded float32 [O, I]).
    """
    rows, columns = weight_OI.shape
    lower = lower_II.to(weight_OI.dtype)
    rounded = torch.empty_like(weight_OI)
    error = torch.zeros_like(weight_OI)
    states = []
    for start in range(columns - TILE, -1, -TILE):
        block, later = slice(start, start + TILE), slice(start + TILE, columns)
        target = weight_OI[:, block] + error[:, later] @ lower[later, block]
        block_states, values = round_tiles(tiles_from_matrix(target))
        rounded[:, block] = matrix_from_tiles(values, rows, TILE)
        error[:, block] = weight_OI[:, block] - rounded[:, block]
        states.append(block_states)
    return torch.stack(states[::-1], dim=1), rounded


def relative_proxy_loss(weight_OI: torch.Tensor, rounded_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - W^; 0 where the layer's output is zero anyway."""
    hessian = hessian_II.to(torch.float32)
    error = weight_OI - rounded_OI
    energy = float(((weight_OI @ hessian) * weight_OI).sum(dtype=torch.float64))
    return float(((error @ hessian) * error).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
