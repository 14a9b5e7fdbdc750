"""Owns the product with a packed matrix on CPUs: decoded weights go from vector registers straight into multiply-adds.

The sixteen tiles of `vectors.py` lie below each other here: they meet the same sixteen inputs, so x is a scalar to the vector
code. Dimension key: B rows of x, O outputs, I inputs, W words a tile.
"""

from functools import lru_cache

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from qtipcli_kernels import codes, vectors
from qtipcli_kernels.spec import TILE, TrellisSpec
from qtipcli_kernels.threads import for_ranges
from qtipcli_kernels.vectors import LANES, ROW_PAIRS, cut_segments, find_table_rows

ROW_COUNTS = (1, 2, 4, 8, 16)
"""Rows of x that a kernel is compiled for; x is filled up with zero rows to the next of these."""

ROWS_IN_REGISTERS = 8
"""Rows of x whose two accumulators each stay in registers, of which AVX-512 has 32."""

CHUNK_TILES = 64
"""Most tiles of a row that are summed at a stretch: 1,024 inputs. Chunks depend on the shape alone, and so does the result."""

PIECE_ITEMS = 4
"""Work items, each LANES rows of tiles by a chunk, that a thread takes at a time: 0.1 ms, against 0.01 ms to hand them out."""


def matvec(x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x @ decode(trellis).T without the decoded matrix; the contract of `reference.matvec`, on every core.

    The same input gives the same bits, whatever the number of threads and whatever the other rows of x; only with a code
    that reads a table a row alone is summed in another order than a row in company.
    """
    batch, inputs = x_BI.shape
    tile_rows, tiles = len(trellis), inputs // TILE
    words = trellis.numpy().view(np.uint32).reshape(-1)
    table = vectors.lookup_table(spec, lut)
    chunks = -(-tiles // CHUNK_TILES)
    items = -(-tile_rows // LANES) * chunks
    result = np.empty((batch, tile_rows * TILE), np.float32)
    for first in range(0, batch, ROW_COUNTS[-1]):
        rows_of_x = x_BI.numpy()[first : first + ROW_COUNTS[-1]]
        rows = next(count for count in ROW_COUNTS if count >= len(rows_of_x))
        x = np.zeros((tiles, rows, TILE), np.float32)
        x[:, : len(rows_of_x)] = rows_of_x.reshape(-1, tiles, TILE).swapaxes(0, 1)
        parts = np.empty((chunks, len(rows_of_x), tile_rows * TILE), np.float32)
        arguments, kernel = (x.reshape(-1), words, table, tile_rows, parts), product(spec, rows)
        for_ranges(items, PIECE_ITEMS, lambda start, stop, a=arguments, k=kernel: k(start, stop, *a))
        parts.sum(axis=0, out=result[first : first + len(rows_of_x)])
    result *= np.float32(vectors.weight_scale(spec))
    return torch.from_numpy(result)


class _Accumulators:
    """The products of one row pair with some rows of x, summed: two vectors over the tiles for each row."""

    def __init__(self, builder, x, first_x, rows):
        self.builder, self.x, self.first_x, self.rows = builder, x, first_x, rows
        self.sums = {}

    def add(self, half, column, weight):
        builder = self.builder
        for row in self.rows:
            element = builder.add(self.first_x, vectors.at(row * TILE + column))
            scalar = builder.load(builder.gep(self.x, [element]))
            product = builder.fmul(weight, vectors.splat(builder, scalar), flags=("contract",))
            if (row, half) in self.sums:
                product = builder.fadd(self.sums[row, half], product, flags=("contract",))
            self.sums[row, half] = product

    def add_to(self, totals, first):
        builder = self.builder
        for (row, half), vector in self.sums.items():
            place = builder.add(first, vectors.at((2 * row + half) * LANES))
            total = vectors.load(builder, totals, place, vectors.FLOATS)
            vectors.store(builder, builder.fadd(total, vector), totals, place)


@intrinsic(prefer_literal=True)
def _multiply_row_pair(typing_context, totals, segments, table_rows, table, x, pair, first_x, rows, recipe):
    """Decode a row pair of LANES tiles once and add its products with `rows` rows of x to totals[pair, row, half, lane].

    totals: float32, 8 * rows * 2 * LANES * `_total_width` elements. x: float32, x[first_x + row * 16 + column].
    pair: int64, 0..7. rows, recipe: literals. The sixteen products of a tile's row are summed before they join the total:
    that halves the rounding error.
    """
    spec, _ = vectors.recipe_spec(recipe)
    multiply = _multiply_entries if _total_width(spec, rows.literal_value) > 1 else _multiply_weights

    def codegen(context, builder, signature, arguments):
        arrays = vectors.pointers(context, builder, signature, arguments, 5)
        multiply(builder, *arrays, arguments[5], arguments[6], rows.literal_value, recipe)
        return context.get_dummy_value()

    return types.void(totals, segments, table_rows, table, x, pair, first_x, rows, recipe), codegen


def _total_width(spec: TrellisSpec, rows: int) -> int:
    """Floats in which one output is summed: a table's entry where `_multiply_entries` serves, else one."""
    return vectors.ENTRY if rows == 1 and codes.lut_shape(spec) is not None else 1


def _multiply_weights(builder, totals, segments, table_rows, table, x, pair, first_x, rows, recipe):
    """The body of `_multiply_row_pair` for weights as vectors over the tiles."""
    blocks = [
        _Accumulators(builder, x, first_x, range(start, min(start + ROWS_IN_REGISTERS, rows)))
        for start in range(0, rows, ROWS_IN_REGISTERS)
    ]
    first_total = builder.mul(pair, vectors.at(rows * 2 * LANES))
    weights = []
    for weight in vectors.row_pair_weights(builder, segments, table_rows, table, pair, recipe):
        blocks[0].add(*weight)
        weights.append(weight)
    blocks[0].add_to(totals, first_total)
    for block in blocks[1:]:
        for weight in weights:
            block.add(*weight)
        block.add_to(totals, first_total)


def _multiply_entries(builder, totals, segments, table_rows, table, x, pair, first_x, rows, recipe):
    """The body of `_multiply_row_pair` for one row of x and a table: multiply-adds read the table's rows from memory.

    Putting weights of sixteen tiles into one vector costs more instructions than one product with it saves. So each tile has
    an accumulator of its own, as wide as an entry; in it x is zero wherever an entry is longer than V.
    """
    spec, _ = vectors.recipe_spec(recipe)
    entry_kind = ir.VectorType(ir.FloatType(), vectors.ENTRY)
    for half in range(2):
        sums = {}
        for number, steps in enumerate(vectors.step_pairs(spec)):
            chosen = [(second, step) for second, step in enumerate(steps) if vectors.places(step, spec)[0][0] == half]
            columns = [vectors.places(step, spec)[0][1] for _, step in chosen]
            x_entries = [_x_entry(builder, x, builder.add(first_x, vectors.at(column)), spec, entry_kind) for column in columns]
            for lane in range(LANES):
                table_places = vectors.paired_rows(builder, table_rows, pair, number, lane, spec)
                for (second, _), x_entry in zip(chosen, x_entries, strict=True):
                    entry = vectors.table_entry(builder, table, table_places[second], entry_kind, spec.weights_per_step)
                    product = builder.fmul(entry, x_entry, flags=("contract",))
                    sums[lane] = builder.fadd(sums[lane], product, flags=("contract",)) if lane in sums else product
        first_total = builder.mul(builder.add(builder.mul(pair, vectors.at(2)), vectors.at(half)), vectors.at(LANES))
        for lane, vector in sums.items():
            place = builder.mul(builder.add(first_total, vectors.at(lane)), vectors.at(vectors.ENTRY))
            total = vectors.load(builder, totals, place, entry_kind)
            vectors.store(builder, builder.fadd(total, vector), totals, place)


def _x_entry(builder, x, index, spec, kind):
    """x at the V columns of a step, then zeros, as wide as an entry of the table."""
    entry = ir.Constant(kind, [0.0] * vectors.ENTRY)
    for column in range(spec.weights_per_step):
        scalar = builder.load(builder.gep(x, [builder.add(index, vectors.at(column))]))
        entry = builder.insert_element(entry, scalar, ir.Constant(ir.IntType(32), column))
    return entry


@lru_cache
def product(spec: TrellisSpec, rows: int, integer_dot: bool = vectors.HAS_INTEGER_DOT):
    """The compiled product of one trellis with `rows` rows of x: (start, stop, x, words, table, tile_rows, parts out).

    start, stop: range of items; item i is the group i // chunks of LANES rows of tiles, and of their inputs the chunk
    i % chunks. x: float32 [I/16, rows, 16], flat. words: uint32, the packed matrix, flat. table: `vectors.lookup_table`.
    parts: float32 [chunks, at most rows, O], to be summed and scaled.
    """
    steps, tile_words, width = spec.steps, spec.words_per_tile, _total_width(spec, rows)
    recipe = vectors.recipe(spec, integer_dot)

    @numba.njit(nogil=True, cache=True)
    def kernel(start, stop, x, words, table, tile_rows, parts):
        tiles = x.size // (rows * TILE)
        chunks = parts.shape[0]
        starts = np.empty(LANES, np.int64)
        segments = np.empty(2 * tile_words * LANES, np.uint32)
        table_rows = np.empty(steps // 2 * LANES, np.uint32)
        totals = np.empty((ROW_PAIRS, rows, 2, LANES, width), np.float32)
        for item in range(start, stop):
            group, chunk = item // chunks, item % chunks
            totals[:] = 0
            for tile in range(tiles * chunk // chunks, tiles * (chunk + 1) // chunks):
                for lane in range(LANES):
                    # Lanes below the last row of tiles repeat it; what they sum goes nowhere.
                    starts[lane] = (min(group * LANES + lane, tile_rows - 1) * tiles + tile) * tile_words
                cut_segments(segments, words, starts, recipe)
                for pair in range(ROW_PAIRS):
                    find_table_rows(table_rows, segments, pair, recipe)
                for pair in range(ROW_PAIRS):
                    first_x = tile * rows * TILE
                    _multiply_row_pair(totals, segments, table_rows, table, x, pair, first_x, rows, recipe)
            for lane in range(min(LANES, tile_rows - group * LANES)):
                first = (group * LANES + lane) * TILE
                for row in range(parts.shape[1]):
                    for half in range(2):
                        for pair in range(ROW_PAIRS):
                            total = np.float32(0)
                            for number in range(width):
                                total += totals[pair, row, half, lane, number]
                            parts[chunk, row, first + half * ROW_PAIRS + pair] = total

    return kernel
