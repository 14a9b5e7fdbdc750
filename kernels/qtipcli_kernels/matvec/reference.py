"""Owns the product with a packed matrix by definition: decode all of it, then one dense product."""

import torch

from qtipcli_kernels import codes
from qtipcli_kernels.packing import matrix_from_tiles, tile_words, unpack
from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, TrellisSpec


def matvec(x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x @ W.T, where W is what the packed matrix stands for.

    x_BI: float32 [B, I]. trellis: int32 [O/16, I/16 * W]. lut: the code's table, its default where None.
    Returns float32 [B, O].
    """
    tiles = codes.values(unpack(tile_words(trellis, spec), spec), spec, lut).reshape(-1, TILE_WEIGHTS)
    return x_BI @ matrix_from_tiles(tiles, len(trellis) * TILE, x_BI.shape[1]).T
