"""Owns decoding by definition: unpack the rings, look the states up in the code, put the tiles in place."""

from collections.abc import Iterator

import torch

from qtipcli_kernels import codes
from qtipcli_kernels.packing import matrix_from_tiles, tile_words, unpack
from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, TrellisSpec


def decode(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """The weights that a packed matrix stands for.

    trellis: int32 [O/16, I/16 * W]. lut: the code's table, its default where None. Returns float32 [O, I].
    """
    states = unpack(tile_words(trellis, spec), spec)
    tiles = codes.values(states, spec, lut).reshape(-1, TILE_WEIGHTS)
    return matrix_from_tiles(tiles, len(trellis) * TILE, trellis.shape[1] // spec.words_per_tile * TILE)


def strips(
    trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None, tile_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Decode `tile_rows` rows of tiles at a time: yields (the outputs they are, float32 [outputs, I]), top to bottom."""
    for first in range(0, len(trellis), tile_rows):
        part = trellis[first : first + tile_rows]
        yield slice(first * TILE, (first + len(part)) * TILE), decode(part, spec, lut)
