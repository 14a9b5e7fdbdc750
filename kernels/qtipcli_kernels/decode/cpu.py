"""Owns decoding to a dense matrix on CPUs: decoded weights are transposed in vector registers and written row by row.

The sixteen tiles of `vectors.py` lie beside each other here, so that what they write is contiguous. Dimension key: O outputs,
I inputs, W words a tile.
"""

from collections.abc import Iterator
from functools import lru_cache

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from qtipcli_kernels import vectors
from qtipcli_kernels.spec import TILE, TrellisSpec
from qtipcli_kernels.threads import for_ranges
from qtipcli_kernels.vectors import LANES, ROW_PAIRS, cut_segments, find_table_rows

PIECE_TILES = 4096
"""Tiles, a million weights, that a thread takes at a time: about 0.3 ms."""


def decode(trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """The weights that a packed matrix stands for; the contract of `reference.decode`, bit for bit, on every core."""
    weight_OI = np.empty((len(trellis) * TILE, trellis.shape[1] // spec.words_per_tile * TILE), np.float32)
    _decode_into(weight_OI, trellis, spec, lut)
    return torch.from_numpy(weight_OI)


def strips(
    trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None, tile_rows: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Decode `tile_rows` rows of tiles at a time; the contract of `reference.strips`.

    One buffer serves all strips: what was yielded is overwritten by the next. Fresh memory would cost more than decoding.
    """
    inputs = trellis.shape[1] // spec.words_per_tile * TILE
    buffer = np.empty((min(tile_rows, len(trellis)) * TILE, inputs), np.float32)
    for first in range(0, len(trellis), tile_rows):
        part = trellis[first : first + tile_rows]
        strip = buffer[: len(part) * TILE]
        _decode_into(strip, part, spec, lut)
        yield slice(first * TILE, first * TILE + len(strip)), torch.from_numpy(strip)


def _decode_into(weight_OI: np.ndarray, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None) -> None:
    words = trellis.numpy().view(np.uint32).reshape(-1)
    table, scale = vectors.lookup_table(spec, lut), np.float32(vectors.weight_scale(spec))
    kernel, rows_in_piece = decoder(spec), max(1, PIECE_TILES * TILE // weight_OI.shape[1])
    for_ranges(len(trellis), rows_in_piece, lambda start, stop: kernel(start, stop, words, table, scale, weight_OI))


def _transposed(builder, rows):
    """LANES vectors of LANES lanes, transposed: four rounds of riffling the first half of the vectors with the second."""
    half = LANES // 2
    low = [lane // 2 + LANES * (lane % 2) for lane in range(LANES)]
    high = [lane + half for lane in low]
    for _ in range(LANES.bit_length() - 1):
        pairs = [(rows[number], rows[number + half]) for number in range(half)]
        rows = [vectors.shuffle(builder, *pair, lanes) for pair in pairs for lanes in (low, high)]
    return rows


@intrinsic(prefer_literal=True)
def _write_row_pair(typing_context, weight, starts, segments, table_rows, table, pair, row_length, scale, recipe):
    """Decode a row pair of LANES tiles and write its rows r and r + 8.

    weight: float32, flat. starts: int64 [LANES], where the top left weight of each tile goes. pair, row_length: int64.
    scale: float32, `vectors.weight_scale`. recipe: literal.
    """

    def codegen(context, builder, signature, arguments):
        out, out_starts, *decoder = vectors.pointers(context, builder, signature, arguments, 5)
        pair_value, length, factor = arguments[5], arguments[6], vectors.splat(builder, arguments[7])
        columns = {}
        for half, column, value in vectors.row_pair_weights(builder, *decoder, pair_value, recipe):
            columns[half, column] = builder.fmul(value, factor)
        for half in range(2):
            row = builder.mul(builder.add(pair_value, vectors.at(half * ROW_PAIRS)), length)
            for lane, values in enumerate(_transposed(builder, [columns[half, column] for column in range(TILE)])):
                start = builder.load(builder.gep(out_starts, [vectors.at(lane)]))
                vectors.store(builder, values, out, builder.add(start, row))
        return context.get_dummy_value()

    return types.void(weight, starts, segments, table_rows, table, pair, row_length, scale, recipe), codegen


@lru_cache
def decoder(spec: TrellisSpec, integer_dot: bool = vectors.HAS_INTEGER_DOT):
    """The compiled decoder of one trellis: (start, stop, words, table, scale, weight_OI out).

    start, stop: range of rows of tiles. words: uint32, the packed matrix, flat. table, scale: from `vectors`.
    weight_OI: float32 [O, I], contiguous.
    """
    steps, tile_words, recipe = spec.steps, spec.words_per_tile, vectors.recipe(spec, integer_dot)

    @numba.njit(nogil=True, cache=True)
    def kernel(start, stop, words, table, scale, weight_OI):
        inputs = weight_OI.shape[1]
        tiles = inputs // TILE
        flat = weight_OI.reshape(-1)
        word_starts = np.empty(LANES, np.int64)
        weight_starts = np.empty(LANES, np.int64)
        segments = np.empty(2 * tile_words * LANES, np.uint32)
        table_rows = np.empty(steps // 2 * LANES, np.uint32)
        for tile_row in range(start, stop):
            for first in range(0, tiles, LANES):
                for lane in range(LANES):
                    # Lanes beyond the last tile repeat it: they write the same values to the same place.
                    tile = min(first + lane, tiles - 1)
                    word_starts[lane] = (tile_row * tiles + tile) * tile_words
                    weight_starts[lane] = tile_row * TILE * inputs + tile * TILE
                cut_segments(segments, words, word_starts, recipe)
                for pair in range(ROW_PAIRS):
                    find_table_rows(table_rows, segments, pair, recipe)
                for pair in range(ROW_PAIRS):
                    _write_row_pair(flat, weight_starts, segments, table_rows, table, pair, inputs, scale, recipe)

    return kernel
