"""Owns BlockLDLQ: rounding a matrix tile by tile, each with the error of the later ones fed back.

Source: QuIP# (arXiv 2402.04396), section 4, on QTIP's tiles of 16 x 16; with a Hessian on both sides, YAQA's objective (arXiv
2505.22988). Dimension key: O outputs, I inputs, B = 16 columns, N tiles, T steps of a walk.
"""

from collections.abc import Callable, Iterator

import torch

from qtipcli_kernels.packing import matrix_from_tiles, tiles_from_matrix
from qtipcli_kernels.spec import TILE

RoundTiles = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""float32 tiles [N, 256] in walk order -> (states int32 [N, T], the values they decode to, float32 [N, 256])."""


def block_ldl(cholesky_II: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The unit block-lower-triangular L of H = L D L^T, from H's Cholesky factor; float64 [I, I], or rounded to `dtype`.

    With C = L blockdiag(C_jj), column block j of L is column block j of C times the inverse of C_jj.
    """
    lower = torch.empty_like(cholesky_II, dtype=dtype)
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
    states: torch.Tensor | None = None
    for start in range(columns - TILE, -1, -TILE):
        block, later = slice(start, start + TILE), slice(start + TILE, columns)
        target = weight_OI[:, block] + error[:, later] @ lower[later, block]
        block_states, values = round_tiles(tiles_from_matrix(target))
        rounded[:, block] = matrix_from_tiles(values, rows, TILE)
        error[:, block] = weight_OI[:, block] - rounded[:, block]
        if states is None:
            states = block_states.new_empty(rows // TILE, columns // TILE, block_states.shape[1])
        states[:, start // TILE] = block_states
    assert states is not None, "a matrix has at least one tile"
    return states, rounded


def round_two_sided(
    weight_OI: torch.Tensor, lower_II: torch.Tensor, lower_OO: torch.Tensor, round_tiles: RoundTiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `weight_OI` (float32 [O, I], both multiples of 16) under a Hessian on each side, given by their block factors.

    With H = L D L^T on both sides, tr(H_out E H_in E^T) = tr(D_out F D_in F^T) for F = L_out^T E L_in. Tile (i, j) of F is
    that of E plus what the tiles below and to the right of it leave there, so (i, j) is rounded as W_ij plus those leftovers,
    which minimises the trace greedily. Tiles on one antidiagonal do not see one another and are rounded in one call.
    Returns (states int32 [O/16, I/16, T], rounded float32 [O, I]).
    """
    rows, columns = weight_OI.shape
    grid = (rows // TILE, columns // TILE)
    lower_in, lower_out = lower_II.to(weight_OI.dtype), lower_OO.to(weight_OI.dtype)
    error = torch.zeros_like(weight_OI)
    passed_on = torch.zeros_like(weight_OI)  # E L_in, of the tiles that are rounded
    rounded = torch.empty_like(weight_OI)
    states: torch.Tensor | None = None
    for row, column in _antidiagonals(*grid, weight_OI.device):
        left, top = int(column.min()) * TILE, int(row.min()) * TILE
        from_right = torch.bmm(
            error[:, left:].unflatten(0, (grid[0], TILE))[row],
            lower_in[left:].unflatten(1, (grid[1], TILE))[:, column].transpose(0, 1),
        )
        from_below = torch.bmm(
            lower_out[top:].unflatten(1, (grid[0], TILE))[:, row].permute(1, 2, 0),
            passed_on[top:].unflatten(1, (grid[1], TILE))[:, column].transpose(0, 1),
        )
        weight_NBB = _tiles(weight_OI, grid)[row, :, column]
        target = weight_NBB + from_right + from_below
        chosen, values = round_tiles(tiles_from_matrix(target.reshape(-1, TILE)))
        value_NBB = matrix_from_tiles(values, len(row) * TILE, TILE).reshape(-1, TILE, TILE)
        _tiles(rounded, grid)[row, :, column] = value_NBB
        _tiles(error, grid)[row, :, column] = weight_NBB - value_NBB
        _tiles(passed_on, grid)[row, :, column] = weight_NBB - value_NBB + from_right
        if states is None:
            states = chosen.new_empty(*grid, chosen.shape[1])
        states[row, column] = chosen
    assert states is not None, "a matrix has at least one tile"
    return states, rounded


def _tiles(matrix_OI: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A view [O/16, 16, I/16, 16]."""
    return matrix_OI.view(grid[0], TILE, grid[1], TILE)


def _antidiagonals(rows: int, columns: int, device: torch.device) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(row, column) of the tiles of each antidiagonal, int64 [N] each, from the last tile of the grid to its first."""
    for distance in range(rows + columns - 2, -1, -1):
        row = torch.arange(max(0, distance - columns + 1), min(rows, distance + 1), device=device)
        yield row, distance - row


def relative_proxy_loss(weight_OI: torch.Tensor, rounded_OI: torch.Tensor, hessian_II: torch.Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T) with E = W - W^; 0 where the layer's output is zero anyway."""
    hessian = hessian_II.to(torch.float32)
    energy = float((weight_OI @ hessian).mul_(weight_OI).sum(dtype=torch.float64))
    error = weight_OI - rounded_OI
    return float((error @ hessian).mul_(error).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
