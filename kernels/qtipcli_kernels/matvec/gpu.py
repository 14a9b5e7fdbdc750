"""Owns the product with a packed matrix on a GPU: decode and multiply in one kernel, nothing of the matrix is ever stored.

Two kernels, one contract. On NVIDIA the lanes' PTX (lane.py) decodes into the registers that the matrix instruction reads. The
other is plain Triton (portable.py): it runs on AMD and in the interpreter, and takes float32 rows and tables of any size.
Both cut the inputs into chunks, one program each, and leave the partial products to be added up in order: no atomics, so that
the same operands give the same bits. Dimension key: B rows of x, I inputs, O outputs, S chunks of inputs.
"""

from collections.abc import Iterator
from dataclasses import astuple

import torch
import triton
import triton.language as tl

from qtipcli_kernels import device, lane, portable
from qtipcli_kernels.compiling import CompileCase
from qtipcli_kernels.spec import TILE, SpecError, TrellisSpec

MAX_ROWS = 16
"""Most rows of x that one launch multiplies: two matrix instructions of eight columns."""

WARPS, TABLE_WARPS = 8, 16
"""Warps a program, each with a row of tiles of its own. More share one table, whose copying they share too."""

UNROLL = 8
"""Tiles that a lane takes in one trip of its loop: their loads are in flight together."""

WARPS_WANTED = 8192
"""Warps of a launch that keep a large GPU busy: 64 on each of 128 processors, as many as an H100's hold at a time."""

MIN_CHUNK = 16
"""Fewest tiles along the inputs that a program is given: below, its start costs more than its work."""

PORTABLE_TILES, PORTABLE_WARPS = 2, 4
"""Tiles that a program of the portable kernel takes side by side, and its warps: 64 sums a thread at sixteen rows."""


@triton.jit
def _nvidia_kernel(
    x_ptr,  # float16 [B, I]
    trellis_ptr,  # uint32 [O/16, I/16 * WORDS]
    lut_ptr,  # uint32 [512], fp16 pairs; anything where HAS_TABLE is false
    partial_ptr,  # float32 [S, B, O]
    tile_rows,
    tile_columns,
    chunk,
    batch,
    unit,
    TRIP: tl.constexpr,  # PTX of UNROLL tiles
    STEP: tl.constexpr,  # PTX of one
    OPERANDS: tl.constexpr,
    DECLARE: tl.constexpr,
    STORE: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    COPIES: tl.constexpr,
    WORDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    thread = tl.arange(0, WARPS * 32)
    lane_id = thread & 31
    table = lane_id
    if HAS_TABLE:
        table = _fill_table(lut_ptr, thread, DECLARE, STORE, COPIES, WARPS)
        table += (lane_id % COPIES) * 4
    tile_row = tl.program_id(0) * WARPS + (thread >> 5)
    # A row past the end is read as the last one and never written: every lane must take part in the matrix instruction.
    read_row = tl.minimum(tile_row, tile_rows - 1).to(tl.int64)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, tile_columns)
    bit = lane_id * LANE_BITS
    offset = bit & 31
    ring = (trellis_ptr + (read_row * tile_columns + first) * WORDS).to(tl.uint64)
    word_0 = ring + (bit >> 5) * 4
    word_1 = ring + ((bit >> 5) + 1) % WORDS * 4
    word_2 = ring + ((bit >> 5) + 2) % WORDS * 4
    # Columns past the batch repeat its last row: what they give is not stored.
    x_low = _pair_of_x(x_ptr, lane_id >> 2, lane_id & 3, first, batch, tile_columns)
    x_high = _pair_of_x(x_ptr, (lane_id >> 2) + 8, lane_id & 3, first, batch, tile_columns)
    zero = tl.zeros([WARPS * 32], tl.float32)
    a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
    f = tl.float32
    for _ in range((last - first) // UNROLL):
        a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
            TRIP, OPERANDS, [word_0, word_1, word_2, offset, table, x_low, x_high, a0, a1, a2, a3, a4, a5, a6, a7],
            dtype=(f, f, f, f, f, f, f, f), is_pure=False, pack=1,
        )  # fmt: skip
        word_0, word_1, word_2 = word_0 + UNROLL * WORDS * 4, word_1 + UNROLL * WORDS * 4, word_2 + UNROLL * WORDS * 4
        x_low, x_high = x_low + UNROLL * 32, x_high + UNROLL * 32
    for _ in range((last - first) % UNROLL):
        a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
            STEP, OPERANDS, [word_0, word_1, word_2, offset, table, x_low, x_high, a0, a1, a2, a3, a4, a5, a6, a7],
            dtype=(f, f, f, f, f, f, f, f), is_pure=False, pack=1,
        )  # fmt: skip
        word_0, word_1, word_2 = word_0 + WORDS * 4, word_1 + WORDS * 4, word_2 + WORDS * 4
        x_low, x_high = x_low + 32, x_high + 32
    # The C fragment: lane 4 g + c holds rows g and g + 8 of columns 2c and 2c + 1.
    outputs = tile_rows * 16
    column = (lane_id & 3) * 2
    output = tile_row * 16 + (lane_id >> 2)
    target = partial_ptr + (tl.program_id(1) * batch + column).to(tl.int64) * outputs + output
    inside = tile_row < tile_rows
    _store_fragment(target, outputs, column, batch, inside, a0 * unit, a1 * unit, a2 * unit, a3 * unit)
    if GROUPS == 2:
        _store_fragment(
            target + 8 * outputs, outputs, column + 8, batch, inside, a4 * unit, a5 * unit, a6 * unit, a7 * unit
        )  # fmt: skip


@triton.jit
def _fill_table(lut_ptr, thread, DECLARE: tl.constexpr, STORE: tl.constexpr, COPIES: tl.constexpr, WARPS: tl.constexpr):
    """Every thread writes four copies of an entry at a time; returns the table's address in shared memory."""
    base = tl.inline_asm_elementwise(DECLARE, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    for part in tl.static_range(512 * COPIES // 4 // (WARPS * 32)):
        quad = thread + part * (WARPS * 32)
        entry = tl.load(lut_ptr + quad // (COPIES // 4))
        tl.inline_asm_elementwise(STORE, "=r,r,r", [entry, base + quad * 16], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    return base


@triton.jit
def _pair_of_x(x_ptr, row, pair, first, batch, tile_columns):
    """Address of the lane's inputs 2 `pair` and 2 `pair` + 1 in tile `first`."""
    row = tl.minimum(row, batch - 1).to(tl.int64)
    return (x_ptr + (row * tile_columns + first) * 16 + pair * 2).to(tl.uint64)


@triton.jit
def _store_fragment(target, outputs, column, batch, inside, c0, c1, c2, c3):
    tl.store(target, c0, mask=inside & (column < batch))
    tl.store(target + outputs, c1, mask=inside & (column + 1 < batch))
    tl.store(target + 8, c2, mask=inside & (column < batch))
    tl.store(target + outputs + 8, c3, mask=inside & (column + 1 < batch))


@triton.jit
def _portable_kernel(
    x_ptr,  # float16 or float32 [B, I]
    trellis_ptr,
    lut_ptr,
    partial_ptr,  # float32 [S, B, O]
    tile_rows,
    tile_columns,
    chunk,
    batch,
    KIND: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    INCREMENT: tl.constexpr,
    L: tl.constexpr,
    KV: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    tile_row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    last = tl.minimum(split * chunk + chunk, tile_columns)
    row = tl.arange(0, ROWS)[:, None, None, None]
    column = portable.column_in_tile()
    total = tl.zeros([ROWS, TILES, 32, 8], tl.float32)
    for first in range(split * chunk, last, TILES):
        tile = first + tl.arange(0, TILES)[:, None, None]
        ring = trellis_ptr + (tile_row * tile_columns + tile) * WORDS
        weight = portable.weights(
            ring, lut_ptr, tile < last, KIND, MULTIPLIER, INCREMENT, L, KV, V, WORDS, LANE_BITS
        )  # fmt: skip
        position = (tile * 16 + column)[None]
        inside = (row < batch) & (tile < last)[None]
        x = tl.load(x_ptr + row.to(tl.int64) * tile_columns * 16 + position, mask=inside, other=0).to(tl.float32)
        total += x * weight[None]
    # [row of x, tile, 8 g, 4 c, column half, row half, parity]: what differs in the column is summed.
    sums = tl.sum(total, 1).reshape(ROWS, 8, 4, 2, 2, 2)
    sums = tl.sum(tl.sum(tl.sum(sums, 5), 3), 2).permute(0, 2, 1).reshape(ROWS, 16)
    outputs = tile_rows * 16
    of_x = tl.arange(0, ROWS)[:, None]
    target = partial_ptr + (split * batch + of_x).to(tl.int64) * outputs + tile_row * 16 + tl.arange(0, 16)[None, :]
    tl.store(target, sums, mask=of_x < batch)


def kernel(spec: TrellisSpec, x: torch.Tensor, lut: torch.Tensor | None = None) -> str:
    """Which kernel multiplies `x` with a packed matrix of `spec`: "ptx" or "triton"."""
    half = x.dtype == torch.float16 and (lut is None or lut.dtype == torch.float16)
    nvidia = x.is_cuda and torch.version.hip is None
    return "ptx" if half and nvidia and lane.served(spec) else "triton"


def partial_products(
    x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T in parts, float32 [S, B, O]: their sum over S is the product.

    x_BI: float16 or float32 [B, I], at most `MAX_ROWS` rows, on a GPU; accumulated in float32. trellis: int32 [O/16, I/16 * W].
    lut: the code's table, its default where None. S depends on O and I alone. Raises DeviceError, SpecError.
    """
    device.check(x=x_BI, trellis=trellis, lut=lut)
    batch, inputs = x_BI.shape
    if x_BI.dtype not in (torch.float16, torch.float32) or not 1 <= batch <= MAX_ROWS:
        raise SpecError(f"x is {x_BI.dtype} with {batch} rows: the kernels multiply 1 to {MAX_ROWS} rows of float16 or float32")
    tile_rows, tile_columns = len(trellis), trellis.shape[1] // spec.words_per_tile
    if inputs != tile_columns * TILE:
        raise SpecError(f"x has {inputs} columns: this packed matrix multiplies {tile_columns * TILE}")
    chosen = kernel(spec, x_BI, lut)
    warps = TABLE_WARPS if spec.weights_per_step == 2 else WARPS
    chunk = chunk_of(tile_rows, tile_columns, warps)
    splits = triton.cdiv(tile_columns, chunk)
    partial_SBO = x_BI.new_empty((splits, batch, tile_rows * TILE), dtype=torch.float32)
    if partial_SBO.numel() == 0:
        return partial_SBO
    operands = (
        x_BI.contiguous(), trellis.contiguous().view(torch.uint32), portable.lut_for(spec, lut, trellis), partial_SBO,
        tile_rows, tile_columns, chunk, batch,
    )  # fmt: skip
    if chosen == "ptx":
        grid = (triton.cdiv(tile_rows, warps), splits)
        _nvidia_kernel[grid](*operands, lane.UNIT.get(spec.code, 1.0), **nvidia_arguments(spec, batch), num_warps=warps)
    else:
        rows = triton.next_power_of_2(batch)
        decoder = astuple(portable.Decoder.of(spec))
        _portable_kernel[(tile_rows, splits)](*operands, *decoder, rows, PORTABLE_TILES, num_warps=PORTABLE_WARPS)
    return partial_SBO


def matvec(x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T, float32 [B, O]: the sum of `partial_products`, with the same arguments."""
    return partial_products(x_BI, trellis, spec, lut).sum(0)


def chunk_of(tile_rows: int, tile_columns: int, warps: int) -> int:
    """Tiles along the inputs that a program takes: enough programs for a large GPU, whole trips of the loop."""
    programs = triton.cdiv(tile_rows, warps)
    splits = triton.cdiv(WARPS_WANTED, programs * warps)
    return triton.cdiv(max(MIN_CHUNK, triton.cdiv(tile_columns, splits)), UNROLL) * UNROLL


def nvidia_arguments(spec: TrellisSpec, batch: int) -> dict[str, object]:
    """The compile-time arguments of the NVIDIA kernel."""
    columns = 8 if batch <= 8 else 16
    has_table = spec.weights_per_step == 2
    return {
        "TRIP": lane.multiply(spec, columns, UNROLL),
        "STEP": lane.multiply(spec, columns, 1),
        "OPERANDS": lane.MULTIPLY_CONSTRAINTS,
        "DECLARE": lane.declare_table(),
        "STORE": lane.store_table(),
        "HAS_TABLE": has_table,
        "COPIES": lane.LUT_COPIES,
        "WORDS": spec.words_per_tile,
        "LANE_BITS": lane.lane_bits(spec),
        "GROUPS": columns // 8,
        "WARPS": TABLE_WARPS if has_table else WARPS,
        "UNROLL": UNROLL,
    }


def compile_cases() -> Iterator[CompileCase]:
    """Every code at 2 bits, rates with other windows, sixteen columns; and the portable kernel, for compiling.py."""
    signature = {"x_ptr": "*fp16", "trellis_ptr": "*u32", "lut_ptr": "*u32", "partial_ptr": "*fp32"}
    signature |= dict.fromkeys(("tile_rows", "tile_columns", "chunk", "batch"), "i32")
    pointers = ("x_ptr", "trellis_ptr", "lut_ptr", "partial_ptr")
    at_two_bits = [(code, 2, 1) for code in ("1mad", "mul1", "3inst", "mcg", "hyb", "hyb2")]
    for code, bits, batch in (*at_two_bits, ("3inst", 3, 1), ("mul1", 4, 1), ("hyb", 2.5, 1), ("hyb", 4, 1), ("hyb", 2, 16)):
        spec = TrellisSpec.at_bits(code, bits)
        arguments = nvidia_arguments(spec, batch)
        yield CompileCase(
            f"matvec ptx {code} {bits:g}, batch {batch}",
            _nvidia_kernel,
            signature | {"unit": "fp32"},
            arguments,
            arguments["WARPS"],
            divisible=pointers,
            weights_per_thread=UNROLL * lane.LANE_WEIGHTS,
            nvidia_only=True,
        )
    for code, batch in (("3inst", 1), ("hyb", 16)):
        spec = TrellisSpec.at_bits(code, 2)
        yield CompileCase(
            f"matvec triton {code} 2, batch {batch}",
            _portable_kernel,
            signature | {"lut_ptr": "*fp16"},
            portable.constexprs(_portable_kernel, (*astuple(portable.Decoder.of(spec)), batch, PORTABLE_TILES)),
            PORTABLE_WARPS,
            divisible=pointers,
        )
