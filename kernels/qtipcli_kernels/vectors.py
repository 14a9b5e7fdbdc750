"""Owns the CPU kernels' decoder: LLVM vector code that turns the words of sixteen tiles into weights, side by side.

One vector lane is one tile, so every window and every code is the same instruction in all lanes, with constant shift counts.
It is written as LLVM vectors because Numba's auto-vectoriser does not keep so long a body in registers. LLVM splits the
vectors where the machine's are narrower: the same code serves AVX-512, AVX2 and NEON. Only the computed codes have a second
form, for machines with integer dot products.

A walk visits rows r and r + 8 of its tile together, for r = 0..7: a "row pair" of 32 weights, the unit of every loop here.
A kernel calls `cut_segments` for sixteen tiles, then, where the code reads a table, `find_table_rows` for each row pair, then
an intrinsic of its own around `row_pair_weights`. Intrinsics take the trellis as a literal string, a "recipe", not from a
closure, so that Numba can cache what it compiles.
"""

import hashlib
import inspect
import sys

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from qtipcli_kernels import codes
from qtipcli_kernels.packing import WALK_TO_TILE
from qtipcli_kernels.spec import HYB_INDEX_BITS, TILE, TrellisSpec

LANES = 16
"""Tiles side by side: a 512-bit register of 32-bit lanes."""

ROW_PAIRS = TILE // 2
"""Row pairs of a tile."""

ROW_PAIR_WALK = tuple((int(p) // TILE // ROW_PAIRS, int(p) % TILE) for p in WALK_TO_TILE[: 2 * TILE])
"""(row half, column) of the 32 weights of a row pair in walk order, the same for every pair."""

SEGMENT_BITS = 16
"""Windows are cut from 32-bit segments that start at every 16th ring bit, so a window of L <= 16 bits lies within one."""

ENTRY = 4
"""Floats that a multiply-add reads at a row of a table, of which V are the row: the narrowest vector there is."""

HYB2_FLIP_FROM = 46_341
"""The smallest s with bit 31 set in s^2 + s; it stays set up to s = 2^16 - 1."""

_FEATURES = llvmlite.binding.get_host_cpu_features()

HAS_INTEGER_DOT = not (numba.config.CPU_NAME or numba.config.CPU_FEATURES) and all(
    _FEATURES.get(name, False) for name in ("avx512bw", "avx512vnni")
)
"""Whether code may use AVX-512's dot products of bytes and of 16-bit integers; never where Numba's target is set by hand."""

_REVISION = hashlib.sha256((inspect.getsource(sys.modules[__name__]) + inspect.getsource(codes)).encode()).hexdigest()
"""Part of every recipe: Numba's cache itself notices changes only in the file of the function that it compiles."""

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_INTS, FLOATS, _QUAD = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES), ir.VectorType(_I32, 4)
_HALVES = ir.VectorType(_I16, 2 * LANES)


def recipe(spec: TrellisSpec, integer_dot: bool = HAS_INTEGER_DOT) -> str:
    """What the intrinsics are specialised to, as the string literal that they take."""
    fields = (spec.code, spec.bits_per_step, spec.state_bits, spec.weights_per_step, int(integer_dot), _REVISION)
    return " ".join(str(field) for field in fields)


def recipe_spec(literal: types.StringLiteral) -> tuple[TrellisSpec, bool]:
    """The trellis of a recipe, and whether its code may use integer dot products."""
    code, *numbers, _ = literal.literal_value.split()
    bits_per_step, state_bits, weights_per_step, integer_dot = map(int, numbers)
    return TrellisSpec(code, bits_per_step, state_bits, weights_per_step), bool(integer_dot)


def places(step: int, spec: TrellisSpec) -> tuple[tuple[int, int], ...]:
    """(row half, column) of the V weights of a row pair's step."""
    return ROW_PAIR_WALK[step * spec.weights_per_step : (step + 1) * spec.weights_per_step]


def weight_scale(spec: TrellisSpec) -> float:
    """What `row_pair_weights` leaves out: the factor that makes the weights of a byte sum of unit variance."""
    return codes.BYTE_SUM_INVERSE_DEVIATION if spec.code in ("1mad", "mul1") else 1.0


def lookup_table(spec: TrellisSpec, lut: torch.Tensor | None) -> np.ndarray:
    """What the vector code looks weights up in, float32 and flat: HYB's table with every sign, `lut`'s as it is.

    HYB: rows (flip of entry 1, flip of entry 0, index), the first only for hyb2. Computed codes: nothing but the padding,
    which lets ENTRY floats be read at the last row.
    """
    table = np.zeros((0, 1), np.float32)
    if codes.lut_shape(spec) is not None:
        table = codes.checked_lut(spec, lut).detach().to(torch.float32).numpy()
    if spec.code in ("hyb", "hyb2"):
        table = np.concatenate((table, table * np.array((-1, 1), np.float32)))
    if spec.code == "hyb2":
        table = np.concatenate((table, table * np.array((1, -1), np.float32)))
    return np.concatenate((table.reshape(-1), np.zeros(ENTRY - 1, np.float32)))


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value & codes.MASK_32] * LANES)


def _halves(value: int) -> ir.Constant:
    return ir.Constant(_HALVES, [value] * 2 * LANES)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [value] * LANES)


def at(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def shuffle(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


def splat(builder, scalar):
    one = builder.insert_element(ir.Constant(ir.VectorType(scalar.type, 1), ir.Undefined), scalar, ir.Constant(_I32, 0))
    return shuffle(builder, one, one, [0] * LANES)


def load(builder, base, index, kind):
    """A vector of `kind` that starts at element `index` of the array at `base`."""
    value = builder.load(builder.bitcast(builder.gep(base, [index]), kind.as_pointer()))
    value.align = 2
    return value


def store(builder, value, base, index):
    builder.store(value, builder.bitcast(builder.gep(base, [index]), value.type.as_pointer())).align = 2


def pointers(context, builder, signature, arguments, count):
    """The data pointers of the first `count` arguments, which are arrays."""
    arrays = zip(signature.args[:count], arguments[:count], strict=True)
    return [context.make_array(kind)(context, builder, value).data for kind, value in arrays]


# --- codes: vectors of states to vectors of weights, the twins of `codes.values` ---


def _byte_sums(builder, state, code, integer_dot):
    """Sum of four bytes less its mean, exact in float32; the factor to unit variance is left to the end of the product."""
    if code == "1mad":
        x = builder.add(builder.mul(state, _ints(codes.ONE_MAD_MULTIPLIER)), _ints(codes.ONE_MAD_INCREMENT))
    else:
        x = builder.mul(state, _ints(codes.MUL1_MULTIPLIER))
    mean = int(codes.BYTE_SUM_MEAN)
    if integer_dot:
        dot = ir.FunctionType(_INTS, [_INTS] * 3)
        function = cgutils.get_or_insert_function(builder.module, dot, "llvm.x86.avx512.vpdpbusd.512")
        return builder.sitofp(builder.call(function, [_ints(-mean), x, _ints(0x0101_0101)]), FLOATS)
    # In 16-bit lanes: a - (255 - b) = a + b - 255, where 255 - b is one and-not. Two of them make the mean, 510.
    pairs = builder.bitcast(x, _HALVES)
    low = builder.and_(builder.not_(pairs), _halves(0xFF))
    high = builder.lshr(pairs, _halves(8))
    pairs = builder.bitcast(builder.sub(high, low), _INTS)
    total = builder.ashr(builder.add(pairs, builder.shl(pairs, _ints(16))), _ints(16))
    return builder.sitofp(total, FLOATS)


def _half_pair_sums(builder, state, code, integer_dot):
    if code == "3inst":
        x = builder.add(builder.mul(state, _ints(codes.THREE_INST_MULTIPLIER)), _ints(codes.THREE_INST_INCREMENT))
    else:
        x = builder.mul(state, _ints(codes.MCG_MULTIPLIER))
    high = builder.ashr(x, _ints(3))
    if integer_dot:
        # 2^13 times the low half plus 0 times the high one: the two shifts below in one instruction, off the shifters.
        dot = ir.FunctionType(_INTS, [_HALVES] * 2)
        function = cgutils.get_or_insert_function(builder.module, dot, "llvm.x86.avx512.pmaddw.d.512")
        low = builder.call(function, [builder.bitcast(x, _HALVES), ir.Constant(_HALVES, [1 << 13, 0] * LANES)])
    else:
        low = builder.ashr(builder.shl(x, _ints(16)), _ints(3))
    # A half's exponent is 0b011xx ^ mask bits, never zero: as float32 it is the same bits 13 places up, re-biased in the xor.
    half_mask, half_xor = codes.HALF_PAIR_MASK & 0xFFFF, codes.HALF_PAIR_XOR & 0xFFFF
    mask = (half_mask & 0x8000) << 16 | (half_mask & 0x7FFF) << 13
    flip = (half_xor << 13) + ((127 - 15) << 23)
    halves = [builder.bitcast(builder.xor(builder.and_(moved, _ints(mask)), _ints(flip)), FLOATS) for moved in (high, low)]
    total = builder.fadd(*halves)
    # Round to the 11 significant bits of fp16 by splitting (Dekker, 1971): 2^13 t - fl((2^13 - 1) t). That ties go to even
    # here was checked for every pair of halves that the mask lets through; 2^13 t is exact, so contraction changes nothing.
    rest = builder.fmul(total, _floats(2.0**13 - 1))
    return builder.fsub(builder.fmul(total, _floats(2.0**13), flags=("contract",)), rest, flags=("contract",))


def _table_rows(builder, states, code):
    """The rows of `lookup_table` that states read, all in 16-bit lanes: h below is s^2 + s modulo 2^16."""
    if code == "lut":
        return states
    h = builder.mul(states, builder.add(states, _halves(1)))
    # Bit 15 of h, the sign of entry 0, lies just above the index bits, so the table has both signs.
    rows = builder.lshr(h, _halves(15 - HYB_INDEX_BITS))
    if code == "hyb2":
        flips = builder.icmp_unsigned(">=", states, _halves(HYB2_FLIP_FROM))
        rows = builder.or_(rows, builder.select(flips, _halves(2 << HYB_INDEX_BITS), _halves(0)))
    return rows


def _states(builder, segments, pair, spec):
    """Yields the states of a row pair in walk order, each a vector over the tiles."""
    for step in range(spec.steps // ROW_PAIRS):
        number, offset = divmod(step * spec.bits_per_step, SEGMENT_BITS)
        if offset < spec.bits_per_step:
            segment = _segment(builder, segments, pair, number, spec)
        yield builder.and_(builder.lshr(segment, _ints(32 - offset - spec.state_bits)), _ints(spec.states - 1))


def _segment(builder, segments, pair, number, spec):
    """Segment `number` of a row pair, counted from where the pair's bits begin."""
    in_pair = spec.steps // ROW_PAIRS * spec.bits_per_step // SEGMENT_BITS
    return load(builder, segments, builder.add(builder.mul(pair, at(in_pair * LANES)), at(number * LANES)), _INTS)


def step_pairs(spec: TrellisSpec) -> list[tuple[int, int]]:
    """The steps of a row pair two by two, as `find_table_rows` does them: SEGMENT_BITS apart wherever kV allows it.

    Else one place apart in the order (column half, row half) of the tile, so that both lie in the same row half.
    """
    apart = spec.bits_per_step
    distance = SEGMENT_BITS // apart if SEGMENT_BITS % apart == 0 else 4 // spec.weights_per_step
    return [(step, step + distance) for step in range(spec.steps // ROW_PAIRS) if step // distance % 2 == 0]


def _paired_states(builder, segments, pair, spec):
    """Yields vectors of 16-bit lanes, for each of `step_pairs`: the first step's state in the high half of a tile's lane."""
    if SEGMENT_BITS % spec.bits_per_step:
        states = list(_states(builder, segments, pair, spec))
        for first, second in step_pairs(spec):
            yield builder.bitcast(builder.or_(builder.shl(states[first], _ints(16)), states[second]), _HALVES)
        return
    # Segments n and n + 1 hold 16-bit pieces (n, n + 1) and (n + 1, n + 2): one funnel shift of both cuts two windows.
    kind = ir.FunctionType(_HALVES, [_HALVES] * 3)
    funnel = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fshl.v{2 * LANES}i16")
    for first, _ in step_pairs(spec):
        number, offset = divmod(first * spec.bits_per_step, SEGMENT_BITS)
        pieces = (builder.bitcast(_segment(builder, segments, pair, number + n, spec), _HALVES) for n in (0, 1))
        yield builder.lshr(builder.call(funnel, [*pieces, _halves(offset)]), _halves(16 - spec.state_bits))


def paired_rows(builder, table_rows, pair, number, lane, spec):
    """The two rows, as indices, that one tile reads in step pair `number` of a row pair: one load, two looked-up steps."""
    first = builder.mul(pair, at(spec.steps // ROW_PAIRS // 2 * LANES))
    both = builder.load(builder.gep(table_rows, [builder.add(first, at(number * LANES + lane))]))
    low = ir.Constant(_I32, 0xFFFF)
    return [builder.zext(row, _I64) for row in (builder.lshr(both, ir.Constant(_I32, 16)), builder.and_(both, low))]


def table_entry(builder, table, row, kind, weights_per_step):
    """`kind` as it lies at a row of the table."""
    entry = builder.load(builder.bitcast(builder.gep(table, [builder.mul(row, at(weights_per_step))]), kind.as_pointer()))
    entry.align = 4
    return entry


def _looked_up(builder, table_rows, table, pair, number, second, spec):
    """The V weights of one step of a step pair: a scalar load a lane, which is faster here than gather instructions."""
    kind = ir.DoubleType() if spec.weights_per_step == 2 else _F32
    found = ir.Constant(ir.VectorType(kind, LANES), ir.Undefined)
    for lane in range(LANES):
        row = paired_rows(builder, table_rows, pair, number, lane, spec)[second]
        entry = table_entry(builder, table, row, kind, spec.weights_per_step)
        found = builder.insert_element(found, entry, ir.Constant(_I32, lane))
    if spec.weights_per_step == 1:
        return [found]
    both = builder.bitcast(found, ir.VectorType(_F32, 2 * LANES))
    return [shuffle(builder, both, both, range(parity, 2 * LANES, 2)) for parity in (0, 1)]


# --- the intrinsics, in the order in which a kernel calls them ---


def _transposed_words(builder, base, starts):
    """Four words of each tile, base[start : start + 4], as four vectors over the tiles."""
    quads = [load(builder, base, start, _QUAD) for start in starts]
    # rows[t] holds tiles t, t + 4, t + 8, t + 12: then a 4 x 4 transposition inside each quarter of the register.
    rows = []
    for t in range(4):
        halves = [shuffle(builder, quads[t + first], quads[t + first + 4], range(8)) for first in (0, 8)]
        rows.append(shuffle(builder, *halves, range(LANES)))
    words = []
    for pair in (0, 2):
        lanes = [quarter + pair + word + side for quarter in range(0, LANES, 4) for word in (0, 1) for side in (0, LANES)]
        left, right = (shuffle(builder, rows[t], rows[t + 1], lanes) for t in (0, 2))
        for word in (0, 2):
            lanes = [quarter + word + t + side for quarter in range(0, LANES, 4) for side in (0, LANES) for t in (0, 1)]
            words.append(shuffle(builder, left, right, lanes))
    return words


@intrinsic(prefer_literal=True)
def cut_segments(typing_context, segments, words, starts, recipe):
    """Write the ring segments of LANES tiles: segments[s, lane] = the 32 bits from ring bit 16 s on, wrapping.

    segments: uint32, 2 * W * LANES elements, where W is the words of a tile. words: uint32, the packed matrix, flat.
    starts: int64 [LANES], where each tile begins.
    """
    spec, _ = recipe_spec(recipe)

    def codegen(context, builder, signature, arguments):
        out, base, tile_starts = pointers(context, builder, signature, arguments, 3)
        tiles = [builder.load(builder.gep(tile_starts, [at(lane)])) for lane in range(LANES)]
        vectors = []
        for quad in range(0, spec.words_per_tile, 4):
            vectors += _transposed_words(builder, base, [builder.add(tile, at(quad)) for tile in tiles])
        for word, vector in enumerate(vectors):
            following = vectors[(word + 1) % len(vectors)]
            straddling = builder.or_(builder.shl(vector, _ints(16)), builder.lshr(following, _ints(16)))
            store(builder, vector, out, at(2 * word * LANES))
            store(builder, straddling, out, at((2 * word + 1) * LANES))
        return context.get_dummy_value()

    return types.void(segments, words, starts, recipe), codegen


@intrinsic(prefer_literal=True)
def find_table_rows(typing_context, table_rows, segments, pair, recipe):
    """Write which rows of `lookup_table` a row pair reads: table_rows[row pair, step pair, lane], first step in the high half.

    table_rows: uint32, half the steps of a walk * LANES elements. segments: from `cut_segments`. pair: int64, 0..7.
    A pass of its own, because LLVM would keep the rows in vector registers and pick them out at twice the cost of a load.
    Does nothing for computed codes.
    """
    spec, _ = recipe_spec(recipe)

    def codegen(context, builder, signature, arguments):
        if codes.lut_shape(spec) is not None:
            out, ring = pointers(context, builder, signature, arguments, 2)
            first = builder.mul(arguments[2], at(spec.steps // ROW_PAIRS // 2 * LANES))
            for number, states in enumerate(_paired_states(builder, ring, arguments[2], spec)):
                rows = builder.bitcast(_table_rows(builder, states, spec.code), _INTS)
                store(builder, rows, out, builder.add(first, at(number * LANES)))
        return context.get_dummy_value()

    return types.void(table_rows, segments, pair, recipe), codegen


def row_pair_weights(builder, segments, table_rows, table, pair, recipe):
    """Yields (row half, column, weights) for the 32 places of a row pair; weights is float32, a vector over the tiles.

    segments, table_rows, table: pointers to what `cut_segments`, `find_table_rows` and `lookup_table` made.
    The weights lack the factor `weight_scale`; apart from it they equal `codes.values` bit for bit.
    """
    spec, integer_dot = recipe_spec(recipe)
    if codes.lut_shape(spec) is not None:
        for number, steps in enumerate(step_pairs(spec)):
            for second, step in enumerate(steps):
                weights = _looked_up(builder, table_rows, table, pair, number, second, spec)
                for place, weight in zip(places(step, spec), weights, strict=True):
                    yield *place, weight
        return
    for place, state in zip(ROW_PAIR_WALK, _states(builder, segments, pair, spec), strict=True):
        if spec.code in ("1mad", "mul1"):
            yield *place, _byte_sums(builder, state, spec.code, integer_dot)
        else:
            yield *place, _half_pair_sums(builder, state, spec.code, integer_dot)
