"""Owns the bit order: states <-> words, and matrices <-> tiles in walk order. Nothing else knows either.

A tile's ring is 256 kV / V bits. The state of step t is the L-bit window that starts at ring bit t kV, most significant bit
first, wrapping at the end. Ring bit b is bit 31 - b % 32 of word b // 32. Dimension key: N tiles, T steps, W words a tile,
O outputs, I inputs.
"""

import numpy as np
import torch

from qtipcli_kernels.spec import TILE, TILE_WEIGHTS, WORD_BITS, SpecError, TrellisSpec

FORMAT_VERSION = 1
"""Version of the bit order and tile order below; the test vectors in tests/kernels/test_packing.py belong to it."""

WALK_TO_TILE = torch.arange(TILE_WEIGHTS).reshape(2, 8, 2, 4, 2).permute(1, 3, 2, 0, 4).reshape(-1)
"""int64 [256]: for each position on the walk, the row-major position in the 16 x 16 tile.

The order of the A operand of `mma.m16n8k16` (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane
4 (row % 8) + (column % 8) // 2 owns eight consecutive positions, ordered by column half, row half, column parity.
"""

TILE_TO_WALK = torch.argsort(WALK_TO_TILE)
"""int64 [256]: the inverse, for each row-major position its position on the walk."""


def pack(states: torch.Tensor, spec: TrellisSpec) -> torch.Tensor:
    """Pack walks into rings.

    states: integer [N, T], each row a tail-biting walk.
    Returns int32 [N, W]. Raises SpecError where two neighbouring states do not share their L - kV bits.
    """
    if states.ndim != 2 or states.shape[1] != spec.steps:
        raise SpecError(f"states have shape {tuple(states.shape)}: a walk of this trellis has {spec.steps} steps")
    state = states.to(device="cpu", dtype=torch.int32)
    shared_mask = (1 << spec.shared_bits) - 1
    broken = (state & shared_mask) != (state.roll(-1, dims=1) >> spec.bits_per_step)
    if bool(broken.any()):
        tile, step = (int(index) for index in broken.nonzero()[0])
        raise SpecError(
            f"tile {tile} is no tail-biting walk: step {step} and its successor do not share {spec.shared_bits} bits"
        )
    # The first kV bits of every window, end to end, are the ring.
    chunk = (state >> spec.shared_bits).to(torch.uint8).numpy()
    bits = np.unpackbits(chunk[..., None], axis=2)[..., 8 - spec.bits_per_step :]
    words = np.packbits(bits.reshape(len(chunk), -1), axis=1).view(">u4")
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def unpack(words: torch.Tensor, spec: TrellisSpec) -> torch.Tensor:
    """The states of packed rings: int32 [N, W] -> int32 [N, T]. The inverse of `pack`."""
    if words.ndim != 2 or words.shape[1] != spec.words_per_tile:
        raise SpecError(f"words have shape {tuple(words.shape)}: a tile of this trellis has {spec.words_per_tile} words")
    start = torch.arange(spec.steps, device=words.device) * spec.bits_per_step
    word, offset = start // WORD_BITS, start % WORD_BITS
    low_mask = 0xFFFF_FFFF
    first = words[:, word].to(torch.int64) & low_mask
    second = words[:, (word + 1) % spec.words_per_tile].to(torch.int64) & low_mask
    # A window spans at most two words: bits offset .. offset + L - 1 of their 64.
    window = ((first << WORD_BITS) | second) >> (2 * WORD_BITS - spec.state_bits - offset)
    return (window & (spec.states - 1)).to(torch.int32)


def tiles_from_matrix(weight_OI: torch.Tensor) -> torch.Tensor:
    """[O, I] -> [O/16 * I/16, 256]: tiles row by row of tiles, each in walk order. O and I are multiples of 16."""
    rows, columns = weight_OI.shape
    if rows % TILE or columns % TILE:
        raise SpecError(f"a matrix of {rows} x {columns} has no whole tiles: pad it to multiples of {TILE}")
    tiles = weight_OI.reshape(rows // TILE, TILE, columns // TILE, TILE).transpose(1, 2)
    return tiles.reshape(-1, TILE_WEIGHTS)[:, WALK_TO_TILE.to(weight_OI.device)]


def matrix_from_tiles(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[O/16 * I/16, 256] in walk order -> [O, I] = [rows, columns]. The inverse of `tiles_from_matrix`."""
    in_tile = tiles[:, TILE_TO_WALK.to(tiles.device)]
    grid = in_tile.reshape(rows // TILE, columns // TILE, TILE, TILE).transpose(1, 2)
    return grid.reshape(rows, columns)


def trellis_shape(rows: int, columns: int, spec: TrellisSpec) -> tuple[int, int]:
    """Shape of the packed matrix ("trellis") of a [rows, columns] weight: [O/16, I/16 * W], both multiples of 16 before."""
    return rows // TILE, columns // TILE * spec.words_per_tile


def tile_words(trellis: torch.Tensor, spec: TrellisSpec) -> torch.Tensor:
    """A packed matrix int32 [O/16, I/16 * W] as its tiles' words, int32 [O/16 * I/16, W], row by row of tiles."""
    if trellis.ndim != 2 or trellis.shape[1] % spec.words_per_tile or trellis.dtype != torch.int32:
        raise SpecError(
            f"a packed matrix is int32 [O/16, I/16 * {spec.words_per_tile}], not {trellis.dtype} {tuple(trellis.shape)}"
        )
    return trellis.reshape(-1, spec.words_per_tile)
