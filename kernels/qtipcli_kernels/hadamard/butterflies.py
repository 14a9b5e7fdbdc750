"""Owns the transform's Triton kernels: Q_M (x) H_F (x) H_P on a program's share of a row, scaled as it comes in and goes out.

Tensors are laid out such that a pass of butterflies finds both its operands in one thread: the axis that it works on comes
first, and the others have at least as many places as there are threads (gpu.plan). Between passes the axes turn by one digit,
which is the trip through shared memory.
"""

import triton
import triton.language as tl

from qtipcli_kernels import device

GUARD_BITS = 16
"""Inward, everything is divided by 2^16 first: sums of the largest bfloat16s then do not overflow float32."""

TOP_BITS = 15
"""Inward, N times a row's root mean square is scaled to [2^14, 2^15): half of fp16's largest number at the most."""

SUM_VALUES = 1024
"""Values that `_sums` takes at a time."""

SMALLEST_SQUARES = 2.0**-100
"""A sum of squares below this has lost some to float32's smallest number, 2^-149."""

PARTS_AHEAD = 4
"""Partial products whose loads are in flight together."""

_PARTS_AHEAD = tl.constexpr(PARTS_AHEAD)
_GUARD_BITS, _TOP_BITS, _SUM_VALUES = tl.constexpr(GUARD_BITS), tl.constexpr(TOP_BITS), tl.constexpr(SUM_VALUES)
_SMALLEST_SQUARES = tl.constexpr(SMALLEST_SQUARES)
_INTERPRETED = tl.constexpr(device.INTERPRETED)


@triton.jit
def sylvester_kernel(
    x_ptr,  # [S, B, N], or [B, I] where INWARD
    scale_in_ptr,  # [I] where INWARD
    row_scale_ptr,  # [B]: written where INWARD, else read
    scale_out_ptr,  # [O], and those of up to two layers more; None where INWARD
    scale_out_1_ptr,
    scale_out_2_ptr,
    bias_ptr,  # [O] or None
    bias_1_ptr,
    bias_2_ptr,
    y_ptr,  # [LAYERS, B, O]
    parts,  # S
    x_row,
    x_part,
    x_1,  # columns between the layers' first ones
    x_2,
    y_row,
    y_layer,
    width_in,
    width_out,
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FOLD: tl.constexpr,
    POWER: tl.constexpr,
    POWER_BITS: tl.constexpr,
    RADIX_BITS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BITS: tl.constexpr,
    INWARD: tl.constexpr,
    FRAGMENTS: tl.constexpr,
):
    """Blocks that are powers of two, F P: a program has TILE blocks of a row, or one of a block's F shares."""
    slabs: tl.constexpr = (BLOCKS + TILE - 1) // TILE
    program = tl.program_id(0) // LAYERS
    if LAYERS > 1:
        layer = tl.program_id(0) % LAYERS
        x_ptr += tl.where(layer == 0, 0, tl.where(layer == 1, x_1, x_2))
        y_ptr += layer.to(tl.int64) * y_layer
        scale_out_ptr = _pick(layer, scale_out_ptr, scale_out_1_ptr, scale_out_2_ptr)
        if bias_ptr is not None:
            bias_ptr = _pick(layer, bias_ptr, bias_1_ptr, bias_2_ptr)
    fold = program % FOLD
    first = program // FOLD % slabs * TILE
    row = (program // (FOLD * slabs)).to(tl.int64)
    x_ptr += row * x_row
    block = (first + tl.arange(0, TILE))[:, None]
    start = block * (FOLD * POWER) + tl.arange(0, POWER)[None, :]
    v, squares = _load(x_ptr + start, scale_in_ptr, start, block < BLOCKS, width_in, parts, x_part, fold, FOLD, POWER, UNIT)
    if INWARD:
        whole_row = x_ptr + tl.zeros((1,), tl.int32)
        if FOLD * slabs == 1:
            row_squares = tl.sum(tl.reshape(squares, (1, TILE * POWER)), 1)
        else:
            row_squares = _sums(whole_row, scale_in_ptr, width_in, UNIT, True)
        exponent = _exponent(_norm(row_squares, whole_row, scale_in_ptr, width_in, UNIT), NORM, NORM_BITS)
        v *= _power(254 - exponent)[:, None]
        # Every program of a row writes the same.
        tl.store(row_scale_ptr + row + tl.zeros((1,), tl.int32), _power(exponent + _GUARD_BITS))
    y = _sylvester(v, TILE, POWER, POWER_BITS, RADIX_BITS)
    if (not INWARD) and (row_scale_ptr is not None):
        y *= tl.load(row_scale_ptr + row)
    out = start + fold * POWER
    wanted = (block < BLOCKS) & (out < width_out)
    at = y_ptr + row * y_row + _place(out, FRAGMENTS)
    _store(y, scale_out_ptr, bias_ptr, at, out, wanted, wanted)


@triton.jit(do_not_specialize=["rows"])
def dense_kernel(
    x_ptr,
    scale_in_ptr,
    row_scale_ptr,
    scale_out_ptr,
    scale_out_1_ptr,
    scale_out_2_ptr,
    bias_ptr,
    bias_1_ptr,
    bias_2_ptr,
    y_ptr,
    parts,
    x_row,
    x_part,
    x_1,
    x_2,
    y_row,
    y_layer,
    width_in,
    width_out,
    dense_ptr,  # bfloat16 +-1 where FLAT, else float32: sqrt(M) Q_M, padded by zeros
    dense_row,
    rows,  # B
    LAYERS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FOLD: tl.constexpr,
    POWER: tl.constexpr,
    POWER_BITS: tl.constexpr,
    RADIX_BITS: tl.constexpr,
    TILE: tl.constexpr,
    UNIT: tl.constexpr,
    NORM: tl.constexpr,
    NORM_BITS: tl.constexpr,
    INWARD: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    ORDER: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Any block, M F P: a program has TILE rows of Q_M, for one of a block's F shares, for ROWS rows of x side by side."""
    slabs: tl.constexpr = (ORDER + TILE - 1) // TILE
    stride: tl.constexpr = FOLD * POWER
    program = tl.program_id(0) // LAYERS
    if LAYERS > 1:
        layer = tl.program_id(0) % LAYERS
        x_ptr += tl.where(layer == 0, 0, tl.where(layer == 1, x_1, x_2))
        y_ptr += layer.to(tl.int64) * y_layer
        scale_out_ptr = _pick(layer, scale_out_ptr, scale_out_1_ptr, scale_out_2_ptr)
        if bias_ptr is not None:
            bias_ptr = _pick(layer, bias_ptr, bias_1_ptr, bias_2_ptr)
    slab = program % slabs
    fold = program // slabs % FOLD
    start = program // (slabs * FOLD) % BLOCKS * (ORDER * stride)
    group = program // (slabs * FOLD * BLOCKS) * ROWS
    # Columns of the product: ROWS rows of x, P of each.
    column = tl.arange(0, ROWS * POWER)
    row_of = group + column // POWER
    column_ptr = (x_ptr + row_of.to(tl.int64) * x_row)[None, :]
    there = (row_of < rows)[None, :]
    m = slab * TILE + tl.arange(0, TILE)
    product = tl.zeros((TILE, ROWS * POWER), tl.float32)
    squares = tl.zeros((CHUNK, ROWS * POWER), tl.float32)
    for first in range(0, ORDER, CHUNK):
        k = first + tl.arange(0, CHUNK)
        i = start + k[:, None] * stride + (column % POWER)[None, :]
        v, more = _load(
            column_ptr + i, scale_in_ptr, i, there & (k < ORDER)[:, None], width_in, parts, x_part, fold, FOLD, POWER, UNIT
        )
        squares += more
        product += _multiply(tl.load(dense_ptr + m[:, None] * dense_row + k[None, :]), v, FLAT)
    row = group + tl.arange(0, ROWS)
    if INWARD:
        whole_row = x_ptr + tl.minimum(row, rows - 1).to(tl.int64) * x_row
        if BLOCKS == 1:
            row_squares = tl.sum(tl.reshape(tl.sum(squares, 0), (ROWS, POWER)), 1)
        else:
            row_squares = _sums(whole_row, scale_in_ptr, width_in, UNIT, True)
        # Rows past the end shall not look like zeros.
        row_squares = tl.where(row < rows, row_squares, 1.0)
        exponent = _exponent(_norm(row_squares, whole_row, scale_in_ptr, width_in, UNIT), NORM, NORM_BITS)
        # Every program of a row writes the same.
        tl.store(row_scale_ptr + row, _power(exponent + _GUARD_BITS), mask=row < rows)
    y = _sylvester(tl.reshape(product, (TILE * ROWS, POWER)), TILE * ROWS, POWER, POWER_BITS, RADIX_BITS)
    y = tl.reshape(y, (TILE, ROWS, POWER))
    if INWARD:
        y *= _power(254 - exponent)[None, :, None]
    elif row_scale_ptr is not None:
        y *= tl.load(row_scale_ptr + row, mask=row < rows, other=0.0)[None, :, None]
    m3 = m[:, None, None]
    out = start + m3 * stride + fold * POWER + tl.arange(0, POWER)[None, None, :]
    wanted = (m3 < ORDER) & (out < width_out)
    at = y_ptr + (row.to(tl.int64) * y_row)[None, :, None] + _place(out, FRAGMENTS)
    _store(y, scale_out_ptr, bias_ptr, at, out, wanted, wanted & (row < rows)[None, :, None])


@triton.jit
def _pick(layer, first, second, third):
    if layer == 1:
        first = second
    elif layer == 2:
        first = third
    return first


@triton.jit
def _load(
    at,
    scale_in_ptr,
    i,
    inside,
    width_in,
    parts,
    x_part,
    fold,
    FOLD: tl.constexpr,
    POWER: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The signed sum of the F inputs that lie POWER apart, times UNIT, and where there is a scale_in the sum of their squares.

    at: pointers to the first of them; i: their columns, which end at width_in. parts: partial products, x_part apart.
    """
    total = tl.zeros(i.shape, tl.float32)
    squares = tl.zeros(i.shape, tl.float32)
    ahead: tl.constexpr = _PARTS_AHEAD if scale_in_ptr is None else 1
    for first in range(0, parts, ahead):
        # Nothing waits for the load before it: a processor's way to memory is long, and there are few programs.
        for part in tl.static_range(ahead):
            there = inside & (i * 0 + first + part < parts) if ahead > 1 else inside
            for other in tl.static_range(FOLD):
                here = there & (i + other * POWER < width_in)
                v = tl.load(at + other * POWER, mask=here, other=0.0).to(tl.float32)
                unit = _sign(fold & other) * UNIT
                if scale_in_ptr is None:
                    total += v * unit
                else:
                    v *= tl.load(scale_in_ptr + i + other * POWER, mask=here, other=0.0).to(tl.float32) * unit
                    total += v
                    squares += v * v
            at += x_part
    return total, squares


@triton.jit
def _sign(bits):
    """-1 to the number of ones in an integer below 256: an entry of Sylvester's matrix, of row & column."""
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (1 - 2 * (bits & 1)).to(tl.float32)


@triton.jit
def _multiply(dense, v, FLAT: tl.constexpr):
    """dense @ v with float32's accuracy from bfloat16 products: of Hartley's parts, those that reach 2^-24.

    Tensor cores cut off what an addition cannot hold: smallest parts first, and the caller adds up what chunks give.
    """
    high, middle, low = _thirds(v)
    if FLAT:
        if _INTERPRETED:
            dense = dense.to(tl.float32)
        product = tl.dot(dense, low)
        product = tl.dot(dense, middle, product)
        product = tl.dot(dense, high, product)
    else:
        dense_high, dense_middle, dense_low = _thirds(dense)
        product = tl.dot(dense_low, high)
        product = tl.dot(dense_middle, middle, product)
        product = tl.dot(dense_high, low, product)
        product = tl.dot(dense_middle, high, product)
        product = tl.dot(dense_high, middle, product)
        product = tl.dot(dense_high, high, product)
    return product


@triton.jit
def _thirds(v):
    """float32 -> three bfloat16s of eight bits each that sum to it exactly; NaN and infinity give a NaN somewhere."""
    high = _cut(v)
    middle = _cut(v - high)
    return _part(high), _part(middle), _part(v - high - middle)


@triton.jit
def _cut(v):
    return (v.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _part(v):
    # Triton's interpreter multiplies bfloat16s as if their bits were integers: there they stay float32, of the same value.
    return v if _INTERPRETED else v.to(tl.bfloat16)


@triton.jit
def _sylvester(x, LINES: tl.constexpr, POWER: tl.constexpr, POWER_BITS: tl.constexpr, RADIX_BITS: tl.constexpr):
    """x H_P, unscaled, float32 [LINES, P]: the highest digit of the column is transformed and becomes the lowest, in turn."""
    for _ in tl.static_range(POWER_BITS // RADIX_BITS):
        x = _digit(x, LINES, POWER, RADIX_BITS)
    if POWER_BITS % RADIX_BITS > 0:
        x = _digit(x, LINES, POWER, POWER_BITS % RADIX_BITS)
    return x


@triton.jit
def _digit(x, LINES: tl.constexpr, POWER: tl.constexpr, BITS: tl.constexpr):
    radix: tl.constexpr = 1 << BITS
    rest: tl.constexpr = POWER >> BITS
    x = tl.reshape(tl.permute(tl.reshape(x, (LINES, radix, rest)), (1, 0, 2)), (radix, LINES * rest))
    for _ in tl.static_range(BITS):
        # The highest bit of the digit is transformed and becomes its lowest.
        a, b = tl.split(tl.permute(tl.reshape(x, (2, radix // 2, LINES * rest)), (1, 2, 0)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (radix, LINES * rest))
    return tl.reshape(tl.permute(tl.reshape(x, (radix, LINES, rest)), (1, 2, 0)), (LINES, POWER))


@triton.jit
def _sums(row_ptr, scale_in_ptr, width_in, UNIT: tl.constexpr, SQUARED: tl.constexpr):
    """float32 [R]: the sum of (scale_in * x UNIT)^2, or of their magnitudes, over each of R whole rows."""
    count: tl.constexpr = row_ptr.shape[0]
    chunk: tl.constexpr = _SUM_VALUES // count
    total = tl.zeros((count, chunk), tl.float32)
    for first in range(0, width_in, chunk):
        i = first + tl.arange(0, chunk)
        scale = tl.load(scale_in_ptr + i, mask=i < width_in, other=0.0).to(tl.float32) * UNIT
        x = tl.load(row_ptr[:, None] + i[None, :], mask=(i < width_in)[None, :], other=0.0).to(tl.float32)
        v = x * scale[None, :]
        total += v * v if SQUARED else tl.abs(v)
    return tl.sum(total, 1)


@triton.jit
def _norm(squares, row_ptr, scale_in_ptr, width_in, UNIT: tl.constexpr):
    """float32 [R]: the root of each row's sum of squares; its sum of magnitudes, which is no less, if the squares over- or
    underflow. Those cost another reading of the rows."""
    sound = (squares >= _SMALLEST_SQUARES) & (squares < float("inf"))
    norm = tl.sqrt(squares)
    if tl.min(sound.to(tl.int32), 0) == 0:
        norm = tl.where(sound, norm, _sums(row_ptr, scale_in_ptr, width_in, UNIT, False))
    return norm


@triton.jit
def _exponent(norm, NORM: tl.constexpr, NORM_BITS: tl.constexpr):
    """The biased exponent of the power of two that takes norm * NORM * 2^NORM_BITS to below 2^15; of 1 for 0, NaN, infinity."""
    biased = ((norm * NORM).to(tl.int32, bitcast=True) >> 23) & 255
    kept = tl.minimum(tl.maximum(biased - (_TOP_BITS - 1) + NORM_BITS, 1), 254 - _GUARD_BITS)
    return tl.where((norm == 0) | (biased == 255), 127 - _GUARD_BITS, kept)


@triton.jit
def _power(biased):
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def _place(column, FRAGMENTS: tl.constexpr):
    """Where a column of y lies: its own place, or that in the order of fragments.py, which takes the bits
    (tile, half, c, c, parity) of its place among 32 to (c, c, tile, half, parity)."""
    if FRAGMENTS:
        column = (column & ~30) | ((column & 6) << 2) | ((column & 24) >> 2)
    return column


@triton.jit
def _store(y, scale_out_ptr, bias_ptr, at, out, wanted, inside):
    """out: columns, wanted: those that exist, both broadcast to y; inside: those of rows that exist."""
    if scale_out_ptr is not None:
        y *= tl.load(scale_out_ptr + out, mask=wanted, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + out, mask=wanted, other=0.0).to(tl.float32)
    tl.store(at, y.to(at.dtype.element_ty), mask=inside)
