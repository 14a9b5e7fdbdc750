"""Owns the product with a packed matrix on CPUs: the loops, threads and buffers around the vector code of `vectors.py`.

Dimension key: B rows of x, O outputs, I inputs, W words a tile.
"""

from functools import lru_cache

import numba
import numpy as np
import torch

from qtipcli_kernels import codes
from qtipcli_kernels.matvec.vectors import (
    HAS_BYTE_DOT,
    LANES,
    REVISION,
    ROW_PAIRS,
    cut_segments,
    find_table_rows,
    multiply_row_pair,
)
from qtipcli_kernels.spec import TILE, TrellisSpec

ROW_COUNTS = (1, 2, 4, 8, 16)
"""Rows of x that a kernel is compiled for; x is filled up with zero rows to the next of these."""

CHUNK_TILES = 64
"""Most tiles of a row that are summed by one worker: 1,024 inputs. Chunks depend on the shape only, so the result does too."""


def matvec(x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x @ decode(trellis).T without the decoded matrix; the contract of `reference.matvec`, on Numba's threads.

    x_BI: float32, contiguous. The same input gives the same bits, whatever the number of threads and the other rows of x.
    """
    batch, inputs = x_BI.shape
    outputs = len(trellis) * TILE
    words = trellis.numpy().view(np.uint32).reshape(-1)
    table = lookup_table(spec, lut)
    scale = codes.BYTE_SUM_INVERSE_DEVIATION if spec.code in ("1mad", "mul1") else 1.0
    result = np.empty((batch, outputs), np.float32)
    for start in range(0, batch, ROW_COUNTS[-1]):
        rows_of_x = x_BI.numpy()[start : start + ROW_COUNTS[-1]]
        padded = next(count for count in ROW_COUNTS if count >= len(rows_of_x))
        x = np.zeros((inputs // TILE, padded, TILE), np.float32)
        x[:, : len(rows_of_x)] = rows_of_x.reshape(-1, inputs // TILE, TILE).swapaxes(0, 1)
        multiply(spec, padded)(x.reshape(-1), words, table, len(trellis), np.float32(scale), result[start:])
    return torch.from_numpy(result)


def lookup_table(spec: TrellisSpec, lut: torch.Tensor | None) -> np.ndarray:
    """What the vector code looks weights up in, float32 and flat: HYB's table with both signs, `lut`'s as it is.

    HYB: rows (flip of entry 1, flip of entry 0, index), the first only for hyb2. Computed codes: one unused zero.
    """
    if codes.lut_shape(spec) is None:
        return np.zeros(1, np.float32)
    table = codes.checked_lut(spec, lut).detach().to(torch.float32).numpy()
    if spec.code in ("hyb", "hyb2"):
        table = np.concatenate((table, table * np.array((-1, 1), np.float32)))
    if spec.code == "hyb2":
        table = np.concatenate((table, table * np.array((1, -1), np.float32)))
    return np.ascontiguousarray(table).reshape(-1)


@lru_cache
def multiply(spec: TrellisSpec, rows: int, byte_dot: bool = HAS_BYTE_DOT):
    """The compiled product of one trellis for `rows` rows of x: (x, words, table, tile_rows, scale, result out).

    x: float32 [I/16, rows, 16], flat. words: uint32, the packed matrix, flat. result: float32 [at least 1, O]; as many of the
    first rows of the product are written as it has. Every name below is a constant that the vector code is specialised to.
    """
    code, state_bits, bits_per_step = spec.code, spec.state_bits, spec.bits_per_step
    weights_per_step, steps, tile_words = spec.weights_per_step, spec.steps, spec.words_per_tile
    reads_table, revision = codes.lut_shape(spec) is not None, REVISION

    @numba.njit(parallel=True, nogil=True, cache=True)
    def kernel(x, words, table, tile_rows, scale, result):
        tiles = x.size // (rows * TILE)
        chunks = (tiles + CHUNK_TILES - 1) // CHUNK_TILES
        groups = (tile_rows + LANES - 1) // LANES
        parts = np.empty((chunks, result.shape[0], tile_rows * TILE), np.float32)
        for item in numba.prange(groups * chunks):
            group, chunk = item // chunks, item % chunks
            # Lanes below the last tile row repeat it; their sums go nowhere.
            starts = np.empty(LANES, np.int64)
            for lane in range(LANES):
                starts[lane] = min(group * LANES + lane, tile_rows - 1) * tiles * tile_words
            segments = np.empty(2 * tile_words * LANES, np.uint32)
            table_rows = np.empty(steps * LANES, np.uint16)
            totals = np.zeros((ROW_PAIRS, rows, 2, LANES), np.float32)
            for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
                cut_segments(segments, words, starts, tile * tile_words, tile_words, revision)
                if reads_table:
                    for pair in range(ROW_PAIRS):
                        find_table_rows(table_rows, segments, pair, code, state_bits, bits_per_step, weights_per_step)
                for pair in range(ROW_PAIRS):
                    multiply_row_pair(
                        totals, segments, table_rows, table, x, pair, tile * rows * TILE,
                        code, state_bits, bits_per_step, weights_per_step, rows, byte_dot,
                    )  # fmt: skip
            for lane in range(min(LANES, tile_rows - group * LANES)):
                for row in range(min(rows, result.shape[0])):
                    for half in range(2):
                        first = (group * LANES + lane) * TILE + half * ROW_PAIRS
                        for pair in range(ROW_PAIRS):
                            parts[chunk, row, first + pair] = totals[pair, row, half, lane]
        for row in range(min(rows, result.shape[0])):
            for output in range(result.shape[1]):
                total = np.float32(0)
                for chunk in range(chunks):
                    total += parts[chunk, row, output]
                result[row, output] = total * scale

    return kernel
