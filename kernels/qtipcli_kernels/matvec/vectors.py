"""Owns the product's inner loop on CPUs: LLVM vector code that decodes sixteen tiles side by side and multiplies them by x.

One vector lane is one tile: sixteen tiles below each other meet the same sixteen inputs. So every window, code and product is
the same instruction in all lanes, shift counts are constants, and x is a scalar. It is written as LLVM vectors because Numba's
auto-vectoriser does not keep so long a body in registers. LLVM splits the vectors where the machine's are narrower: the same
code serves AVX-512, AVX2 and NEON, and only the byte sum has a second form for machines that have an instruction for it.

A walk visits rows r and r + 8 of its tile together, for r = 0..7: a "row pair" of 32 weights, the unit of every loop here.
The intrinsics take the trellis as literals, not from a closure, so that Numba can cache what it compiles.
"""

import hashlib
from pathlib import Path

import llvmlite.binding
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qtipcli_kernels import codes
from qtipcli_kernels.packing import WALK_TO_TILE
from qtipcli_kernels.spec import HYB_INDEX_BITS, TILE

LANES = 16
"""Tiles side by side: a 512-bit register of 32-bit lanes."""

ROW_PAIRS = TILE // 2
"""Row pairs of a tile."""

ROW_PAIR_WALK = tuple((int(p) // TILE // ROW_PAIRS, int(p) % TILE) for p in WALK_TO_TILE[: 2 * TILE])
"""(row half, column) of the 32 weights of a row pair in walk order, the same for every pair."""

SEGMENT_BITS = 16
"""Windows are cut from 32-bit segments that start at every 16th ring bit, so a window of L <= 16 bits lies within one."""

ROWS_IN_REGISTERS = 8
"""Rows of x whose two accumulators each stay in registers; AVX-512 has 32."""

HAS_BYTE_DOT = not (numba.config.CPU_NAME or numba.config.CPU_FEATURES) and llvmlite.binding.get_host_cpu_features().get(
    "avx512vnni", False
)
"""Whether code for this machine may use VNNI's dot product of four bytes; never where Numba's target is set by hand."""

REVISION = hashlib.sha256(Path(__file__).read_bytes() + Path(codes.__file__).read_bytes()).hexdigest()
"""Names the code generated here: Numba's cache itself looks only at the file of the function that it compiles."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, _FLOATS, _QUAD = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES), ir.VectorType(_I32, 4)
_HALVES = ir.VectorType(_I16, 2 * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value & codes.MASK_32] * LANES)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _at(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _shuffle(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined), scalar, ir.Constant(_I32, 0))
    return _shuffle(builder, one, one, [0] * LANES)


def _load(builder, base, index, kind):
    """A vector of `kind` that starts at element `index` of the array at `base`."""
    value = builder.load(builder.bitcast(builder.gep(base, [index]), kind.as_pointer()))
    value.align = 2
    return value


def _store(builder, value, base, index):
    builder.store(value, builder.bitcast(builder.gep(base, [index]), value.type.as_pointer())).align = 2


def _pointers(context, builder, signature, arguments, count):
    """The data pointers of the first `count` arguments, which are arrays."""
    return [context.make_array(kind)(context, builder, value).data for kind, value in zip(signature.args[:count], arguments)]


# --- codes: vectors of states to vectors of weights, the twins of `codes.values` ---


def _byte_sums(builder, state, code, byte_dot):
    """Sum of four bytes less its mean, exact in float32; the factor to unit variance is left to the end of the product."""
    if code == "1mad":
        x = builder.add(builder.mul(state, _ints(codes.ONE_MAD_MULTIPLIER)), _ints(codes.ONE_MAD_INCREMENT))
    else:
        x = builder.mul(state, _ints(codes.MUL1_MULTIPLIER))
    mean = int(codes.BYTE_SUM_MEAN)
    if byte_dot:
        dot = ir.FunctionType(_INTS, [_INTS] * 3)
        function = cgutils.get_or_insert_function(builder.module, dot, "llvm.x86.avx512.vpdpbusd.512")
        return builder.sitofp(builder.call(function, [_ints(-mean), x, _ints(0x0101_0101)]), _FLOATS)
    # In 16-bit lanes: a - (255 - b) = a + b - 255, where 255 - b is one and-not. Two of them make the mean, 510.
    pairs = builder.bitcast(x, _HALVES)
    low = builder.and_(builder.not_(pairs), ir.Constant(_HALVES, [0xFF] * 2 * LANES))
    high = builder.lshr(pairs, ir.Constant(_HALVES, [8] * 2 * LANES))
    pairs = builder.bitcast(builder.sub(high, low), _INTS)
    total = builder.ashr(builder.add(pairs, builder.shl(pairs, _ints(16))), _ints(16))
    return builder.sitofp(total, _FLOATS)


def _half_pair_sums(builder, state, code):
    if code == "3inst":
        x = builder.add(builder.mul(state, _ints(codes.THREE_INST_MULTIPLIER)), _ints(codes.THREE_INST_INCREMENT))
    else:
        x = builder.mul(state, _ints(codes.MCG_MULTIPLIER))
    # A half's exponent is 0b011xx ^ mask bits, never zero: as float32 it is the same bits 13 places up, re-biased in the xor.
    half_mask, half_xor = codes.HALF_PAIR_MASK & 0xFFFF, codes.HALF_PAIR_XOR & 0xFFFF
    mask = (half_mask & 0x8000) << 16 | (half_mask & 0x7FFF) << 13
    flip = (half_xor << 13) + ((127 - 15) << 23)
    halves = []
    for in_high_bits in (x, builder.shl(x, _ints(16))):
        moved = builder.and_(builder.ashr(in_high_bits, _ints(3)), _ints(mask))
        halves.append(builder.bitcast(builder.xor(moved, _ints(flip)), _FLOATS))
    total = builder.fadd(*halves)
    # Round to the 11 significant bits of fp16 by splitting (Dekker, 1971): 2^13 t - fl((2^13 - 1) t). That ties go to even
    # here was checked for every pair of halves that the mask lets through; 2^13 t is exact, so contraction changes nothing.
    rest = builder.fmul(total, _floats(2.0**13 - 1))
    return builder.fsub(builder.fmul(total, _floats(2.0**13), flags=("contract",)), rest, flags=("contract",))


def _table_row(builder, state, code):
    """The row of the table from `cpu.lookup_table` that a state reads."""
    if code == "lut":
        return state
    h = builder.mul(state, builder.add(state, _ints(1)))
    # Bit 15 of h, the sign of entry 0, lies just above the index bits: the table has both signs.
    row = builder.and_(builder.lshr(h, _ints(15 - HYB_INDEX_BITS)), _ints((2 << HYB_INDEX_BITS) - 1))
    if code == "hyb2":
        row = builder.or_(row, builder.shl(builder.lshr(h, _ints(31)), _ints(HYB_INDEX_BITS + 1)))
    return row


def _windows(builder, segments, pair, state_bits, bits_per_step, weights_per_step):
    """Yields the states of a row pair in walk order, each a vector over the tiles."""
    steps = len(ROW_PAIR_WALK) // weights_per_step
    first = builder.mul(pair, _at(steps * bits_per_step // SEGMENT_BITS * LANES))
    segment = None
    for start in range(0, steps * bits_per_step, bits_per_step):
        number, offset = divmod(start, SEGMENT_BITS)
        if segment is None or offset < bits_per_step:
            segment = _load(builder, segments, builder.add(first, _at(number * LANES)), _INTS)
        yield builder.and_(builder.lshr(segment, _ints(32 - offset - state_bits)), _ints((1 << state_bits) - 1))


def _looked_up(builder, table, rows, first, weights_per_step):
    """The V weights of one step from a table: a scalar load a lane, which is faster here than gather instructions."""
    kind = ir.DoubleType() if weights_per_step == 2 else _F32
    entries = builder.bitcast(table, kind.as_pointer())
    found = ir.Constant(ir.VectorType(kind, LANES), ir.Undefined)
    for lane in range(LANES):
        row = builder.load(builder.gep(rows, [builder.add(first, _at(lane))]))
        entry = builder.load(builder.gep(entries, [builder.zext(row, _I64)]))
        entry.align = 4
        found = builder.insert_element(found, entry, ir.Constant(_I32, lane))
    if weights_per_step == 1:
        return [found]
    both = builder.bitcast(found, ir.VectorType(_F32, 2 * LANES))
    return [_shuffle(builder, both, both, range(parity, 2 * LANES, 2)) for parity in (0, 1)]


# --- the intrinsics, in the order in which the kernel calls them for a column of LANES tiles ---


def _transposed_words(builder, base, starts):
    """Four words of each tile, base[start : start + 4], as four vectors over the tiles."""
    quads = [_load(builder, base, start, _QUAD) for start in starts]
    # rows[t] holds tiles t, t + 4, t + 8, t + 12: then a 4 x 4 transposition inside each quarter of the register.
    rows = []
    for t in range(4):
        halves = [_shuffle(builder, quads[t + first], quads[t + first + 4], range(8)) for first in (0, 8)]
        rows.append(_shuffle(builder, *halves, range(LANES)))
    words = []
    for pair in (0, 2):
        lanes = [quarter + pair + word + side for quarter in range(0, LANES, 4) for word in (0, 1) for side in (0, LANES)]
        left, right = (_shuffle(builder, rows[t], rows[t + 1], lanes) for t in (0, 2))
        for word in (0, 2):
            lanes = [quarter + word + t + side for quarter in range(0, LANES, 4) for side in (0, LANES) for t in (0, 1)]
            words.append(_shuffle(builder, left, right, lanes))
    return words


@intrinsic(prefer_literal=True)
def cut_segments(typing_context, segments, trellis, starts, offset, words, revision):
    """Write the ring segments of LANES tiles: segments[s, lane] = the 32 bits from ring bit 16 s on, wrapping.

    segments: uint32, 2 * words * LANES elements. trellis: uint32, flat. starts: int64 [LANES], where each tile row begins.
    offset: int64, the tile's first word within its row. words: literal, words a tile. revision: literal, REVISION.
    """

    def codegen(context, builder, signature, arguments):
        out, base, row_starts = _pointers(context, builder, signature, arguments, 3)
        tiles = [builder.add(builder.load(builder.gep(row_starts, [_at(lane)])), arguments[3]) for lane in range(LANES)]
        vectors = []
        for quad in range(0, words.literal_value, 4):
            vectors += _transposed_words(builder, base, [builder.add(tile, _at(quad)) for tile in tiles])
        for word, vector in enumerate(vectors):
            following = vectors[(word + 1) % len(vectors)]
            straddling = builder.or_(builder.shl(vector, _ints(16)), builder.lshr(following, _ints(16)))
            _store(builder, vector, out, _at(2 * word * LANES))
            _store(builder, straddling, out, _at((2 * word + 1) * LANES))
        return context.get_dummy_value()

    return types.void(segments, trellis, starts, offset, words, revision), codegen


@intrinsic(prefer_literal=True)
def find_table_rows(typing_context, table_rows, segments, pair, code, state_bits, bits_per_step, weights_per_step):
    """Write which table rows a row pair reads: table_rows[pair, step, lane].

    table_rows: uint16, 8 * 32/V * LANES elements. segments: from `cut_segments`. pair: int64, 0..7. The rest: literals.
    A pass of its own, because LLVM would keep the rows in vector registers and pick them out at twice the cost of a load.
    """

    def codegen(context, builder, signature, arguments):
        out, ring = _pointers(context, builder, signature, arguments, 2)
        trellis = (state_bits.literal_value, bits_per_step.literal_value, weights_per_step.literal_value)
        first = builder.mul(arguments[2], _at(len(ROW_PAIR_WALK) // weights_per_step.literal_value * LANES))
        for step, state in enumerate(_windows(builder, ring, arguments[2], *trellis)):
            row = builder.trunc(_table_row(builder, state, code.literal_value), ir.VectorType(_I16, LANES))
            _store(builder, row, out, builder.add(first, _at(step * LANES)))
        return context.get_dummy_value()

    return types.void(table_rows, segments, pair, code, state_bits, bits_per_step, weights_per_step), codegen


def _row_pair_weights(builder, pointers, pair, code, trellis, byte_dot):
    """Yields (row half, column, weights over the tiles) along the walk of a row pair."""
    segments, table_rows, table = pointers
    weights_per_step = trellis[2]
    steps = len(ROW_PAIR_WALK) // weights_per_step
    if code in ("hyb", "hyb2", "lut"):
        first = builder.mul(pair, _at(steps * LANES))
        for step in range(steps):
            weights = _looked_up(builder, table, table_rows, builder.add(first, _at(step * LANES)), weights_per_step)
            for place, weight in zip(ROW_PAIR_WALK[step * weights_per_step :], weights, strict=False):
                yield *place, weight
        return
    for place, state in zip(ROW_PAIR_WALK, _windows(builder, segments, pair, *trellis), strict=True):
        if code in ("1mad", "mul1"):
            yield *place, _byte_sums(builder, state, code, byte_dot)
        else:
            yield *place, _half_pair_sums(builder, state, code)


class _Accumulators:
    """The sums of one row pair for some rows of x: two vectors a row, which start with the first product."""

    def __init__(self, builder, x, first_x, rows):
        self.builder, self.x, self.first_x, self.rows = builder, x, first_x, rows
        self.sums = {}

    def add(self, half, column, weight):
        for row in self.rows:
            scalar = self.builder.load(self.builder.gep(self.x, [self.builder.add(self.first_x, _at(row * TILE + column))]))
            product = self.builder.fmul(weight, _splat(self.builder, scalar), flags=("contract",))
            if (row, half) in self.sums:
                product = self.builder.fadd(self.sums[row, half], product, flags=("contract",))
            self.sums[row, half] = product

    def add_to(self, totals, first):
        for (row, half), vector in self.sums.items():
            place = self.builder.add(first, _at((2 * row + half) * LANES))
            _store(self.builder, self.builder.fadd(_load(self.builder, totals, place, _FLOATS), vector), totals, place)


@intrinsic(prefer_literal=True)
def multiply_row_pair(
    typing_context, totals, segments, table_rows, table, x, pair, first_x,
    code, state_bits, bits_per_step, weights_per_step, rows, byte_dot,
):  # fmt: skip
    """Decode a row pair of LANES tiles once and add its products with `rows` rows of x: totals[pair, row, half, lane].

    totals: float32, 8 * rows * 2 * LANES elements. segments: from `cut_segments`. table_rows, table: from `find_table_rows`
    and `cpu.lookup_table`, unused by computed codes. x: float32, x[first_x + row * 16 + column]. pair: int64, 0..7. The rest:
    literals. The sixteen products of a row are summed on their own before they join the total: that halves the rounding error.
    """

    def codegen(context, builder, signature, arguments):
        out, *decoder, x_base = _pointers(context, builder, signature, arguments, 5)
        pair_value, first = arguments[5], arguments[6]
        trellis = (state_bits.literal_value, bits_per_step.literal_value, weights_per_step.literal_value)
        batch = rows.literal_value
        blocks = [
            _Accumulators(builder, x_base, first, range(start, min(start + ROWS_IN_REGISTERS, batch)))
            for start in range(0, batch, ROWS_IN_REGISTERS)
        ]
        weights = []
        for place in _row_pair_weights(builder, decoder, pair_value, code.literal_value, trellis, byte_dot.literal_value):
            blocks[0].add(*place)
            weights.append(place)
        first_total = builder.mul(pair_value, _at(batch * 2 * LANES))
        blocks[0].add_to(out, first_total)
        for block in blocks[1:]:
            for place in weights:
                block.add(*place)
            block.add_to(out, first_total)
        return context.get_dummy_value()

    arrays = (totals, segments, table_rows, table, x)
    literals = (code, state_bits, bits_per_step, weights_per_step, rows, byte_dot)
    return types.void(*arrays, pair, first_x, *literals), codegen
