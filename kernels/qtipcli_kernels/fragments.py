"""Owns the order in which lanes of an NVIDIA GPU read rows of x: that of the matrix instruction, 16 bytes at a time."""

import torch
from torch.nn import functional

from qtipcli_kernels.spec import TILE

FRAGMENT_INPUTS = 2 * TILE
FRAGMENT_BYTES = 2 * FRAGMENT_INPUTS
"""Inputs of a row of x whose order `fragments` changes among themselves, those of two tiles, and their bytes."""


def fragments(x_BI: torch.Tensor) -> torch.Tensor:
    """Rows of x in the order in which lanes read them: [B, I] -> [B, I rounded up to 32].

    The B operand of lane 4 g + c has inputs 2c, 2c + 1, 2c + 8 and 2c + 9 of a tile; those of two neighbouring tiles follow one
    another, the 16 bytes that a lane loads at once. Of an odd number of tiles the last one's are eight apart; what lies between
    is never read.
    """
    missing = -x_BI.shape[1] % FRAGMENT_INPUTS
    padded = functional.pad(x_BI, (0, missing)) if missing else x_BI
    halves = padded.reshape(len(x_BI), -1, 2, 2, 4, 2)  # [row, pair of tiles, tile, half, c, parity]
    return halves.permute(0, 1, 4, 2, 3, 5).reshape(padded.shape)
