"""Owns the product with a packed matrix on a GPU: decode and multiply in one kernel, nothing of the matrix is ever stored.

Two kernels, one contract. On NVIDIA the lanes' PTX (lane.py) decodes into the registers that the matrix instruction reads. The
other is plain Triton (portable.py): it runs on AMD and in the interpreter, and takes float32 rows and tables of any size.
Both cut the inputs into chunks and leave the partial products of programs to be added up in order: no atomics, so that
the same operands give the same bits. Dimension key: B rows of x, I inputs, O outputs, S chunks of inputs.
"""

from collections.abc import Iterator
from dataclasses import astuple
from functools import lru_cache

import torch
import triton
import triton.language as tl

from qtipcli_kernels import device, lane, portable
from qtipcli_kernels.compiling import CompileCase
from qtipcli_kernels.fragments import FRAGMENT_INPUTS, fragments
from qtipcli_kernels.matvec import loop
from qtipcli_kernels.spec import TILE, SpecError, TrellisSpec

MAX_ROWS = 16
"""Most rows of x that one launch multiplies: two matrix instructions of eight columns."""

WARPS, WIDE_WARPS = 8, 16
"""Warps a program, which share a table and its copying. There is room for fewer programs with the wide table."""

WIDE_SHARED_BYTES = 2 * (65 << 10)
"""Shared memory of a multiprocessor from which on two programs with the wide table have room: sm_80, 90 and 100."""

UNROLL = 4
"""Tiles of each of its rows that a lane takes in one trip of its loop: their loads are in flight together."""

WARPS_WANTED = 6144
"""Warps of a launch that keep a large GPU busy: half more than its 132 processors hold at 64 registers a thread."""

MIN_CHUNK = 16
"""Fewest tiles along the inputs that a warp is given: below, its start costs more than its work."""

PTX, PORTABLE = "ptx", "triton"
"""The kernels' names."""

PORTABLE_TILES, PORTABLE_WARPS = 2, 4
"""Tiles that a program of the portable kernel takes side by side, and its warps: 64 sums a thread at sixteen rows."""


@triton.jit
def _nvidia_kernel(
    x_ptr,  # float16 [B, I rounded up to 32], in the order of fragments.py
    trellis_ptr,  # uint32 [O/16, I/16 * WORDS]
    lut_ptr,  # uint32 [512], fp16 pairs; anything where HAS_TABLE is false
    partial_ptr,  # float32 [S, B, O]
    tile_rows,
    tile_columns,
    chunk,  # tiles of a row that a warp has, UNROLL times some
    batch,
    unit,
    MULTIPLY: tl.constexpr,  # PTX of the loop
    OPERANDS: tl.constexpr,
    FIND: tl.constexpr,
    STORE: tl.constexpr,
    COPIES: tl.constexpr,  # of the table; 0: there is none
    WORDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    thread = tl.arange(0, WARPS * 32)
    lane_id = thread & 31
    copy = 0 * lane_id
    if COPIES > 0:
        _fill_table(lut_ptr, thread, tile_rows, FIND, STORE, COPIES, WARPS)
        copy = (lane_id % COPIES) * 4
    # Four warps (loop.WARP_PARTS) have two rows of tiles (loop.WARP_ROWS). Rows past the end are read as the last ones and
    # never written: every lane must take part in the matrix instruction.
    part = (thread >> 5) & 3
    tile_row = (tl.program_id(0) * (WARPS // 4) + (thread >> 7)) * 2
    read_row = tl.minimum(tile_row, tile_rows - 1).to(tl.int64)
    to_next = tl.minimum(tile_row + 1, tile_rows - 1).to(tl.int64) - read_row
    first = (tl.program_id(1) * 4 + part) * chunk
    count = tl.maximum(tl.minimum(chunk, tile_columns - first), 0)
    bit = lane_id * LANE_BITS
    offset = bit & 31
    ring = (trellis_ptr + (read_row * tile_columns + first) * WORDS).to(tl.uint64)
    word_0 = ring + (bit >> 5) * 4
    word_1 = ring + ((bit >> 5) + 1) % WORDS * 4
    word_2 = ring + ((bit >> 5) + 2) % WORDS * 4
    row_bytes = to_next * tile_columns * WORDS * 4
    # Columns of the matrix instruction past the batch multiply zeros: what they give is not stored.
    row_of_x = lane_id >> 2
    low_there, high_there = (row_of_x < batch).to(tl.int32), (row_of_x + 8 < batch).to(tl.int32)
    x_low = _part_of_x(x_ptr, row_of_x, lane_id & 3, first, batch, tile_columns)
    x_high = _part_of_x(x_ptr, row_of_x + 8, lane_id & 3, first, batch, tile_columns)
    trips, rest = count // UNROLL, count % UNROLL
    f = tl.float32
    a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7 = tl.inline_asm_elementwise(
        MULTIPLY,
        OPERANDS,
        [word_0, word_1, word_2, row_bytes, offset, copy, x_low, x_high, low_there, high_there, trips, rest, thread],
        dtype=(f, f, f, f, f, f, f, f, f, f, f, f, f, f, f, f),
        is_pure=False,
        pack=1,
    )
    outputs = tile_rows * 16
    target = partial_ptr + (tl.program_id(1) * batch).to(tl.int64) * outputs
    inside, next_inside = (part == 0) & (tile_row < tile_rows), (part == 0) & (tile_row + 1 < tile_rows)
    _store_fragment(target, tile_row, outputs, lane_id, 0, batch, inside, a0 * unit, a1 * unit, a2 * unit, a3 * unit)
    _store_fragment(target, tile_row + 1, outputs, lane_id, 0, batch, next_inside, b0 * unit, b1 * unit, b2 * unit, b3 * unit)
    if GROUPS == 2:
        _store_fragment(target, tile_row, outputs, lane_id, 8, batch, inside, a4 * unit, a5 * unit, a6 * unit, a7 * unit)
        _store_fragment(
            target, tile_row + 1, outputs, lane_id, 8, batch, next_inside, b4 * unit, b5 * unit, b6 * unit, b7 * unit
        )


@triton.jit
def _fill_table(lut_ptr, thread, tile_rows, FIND: tl.constexpr, STORE: tl.constexpr, COPIES: tl.constexpr, WARPS: tl.constexpr):
    """Every thread writes four copies of an entry at a time, to shared memory."""
    if COPIES == 32:
        _set_aside(lut_ptr, thread, tile_rows < 0)  # never, which the compiler cannot know
    base = tl.inline_asm_elementwise(FIND, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)
    for part in tl.static_range(512 * COPIES // 4 // (WARPS * 32)):
        quad = thread + part * (WARPS * 32)
        entry = tl.load(lut_ptr + quad // (COPIES // 4))
        tl.inline_asm_elementwise(STORE, "=r,r,r", [entry, base + quad * 16], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def _set_aside(lut_ptr, thread, used):
    """Makes the compiler keep 64 KiB of shared memory for this, and thereby for the wide table: nothing else in the kernel uses
    any. A kernel may declare 48 KiB itself."""
    if used:
        place = tl.arange(0, 512 * 32)
        tl.store(lut_ptr + thread, tl.gather(tl.load(lut_ptr + place), thread, 0))


@triton.jit
def _part_of_x(x_ptr, row, part, first, batch, tile_columns):
    """Address of a lane's inputs in the pair of tiles that begins with tile `first`, an even one."""
    row = tl.minimum(row, batch - 1).to(tl.int64)
    width = (tile_columns + 1) // 2 * 32
    return (x_ptr + row * width + first * 16 + part * 8).to(tl.uint64)


@triton.jit
def _store_fragment(target, tile_row, outputs, lane_id, first_column, batch, inside, c0, c1, c2, c3):
    """The C fragment: lane 4 g + c holds outputs g and g + 8 of columns 2c and 2c + 1, which are rows of x."""
    column = first_column + (lane_id & 3) * 2
    target += column.to(tl.int64) * outputs + tile_row * 16 + (lane_id >> 2)
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


def kernel(spec: TrellisSpec, x: torch.Tensor, lut: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> str:
    """Which kernel multiplies a packed matrix of `spec` by `x`, or by rows of `dtype` where x lies: "ptx" or "triton"."""
    half = (dtype or x.dtype) == torch.float16 and (lut is None or lut.dtype == torch.float16)
    nvidia = x.is_cuda and torch.version.hip is None
    return PTX if half and nvidia and lane.served(spec) else PORTABLE


def partial_products(
    x_BI: torch.Tensor,
    trellis: torch.Tensor,
    spec: TrellisSpec,
    lut: torch.Tensor | None = None,
    in_fragments: bool = False,
) -> torch.Tensor:
    """x W^T in parts, float32 [S, B, O]: their sum over S is the product.

    x_BI: float16 or float32 [B, I], at most `MAX_ROWS` rows, on a GPU; accumulated in float32. in_fragments: it already has the
    order of `fragments`, which the kernel "ptx" reads. trellis: int32 [O/16, I/16 * W]. lut: the code's table, its default
    where None. S depends on O and I alone. Raises DeviceError, SpecError.
    """
    device.check(x=x_BI, trellis=trellis, lut=lut)
    batch, inputs = x_BI.shape
    if x_BI.dtype not in (torch.float16, torch.float32) or not 1 <= batch <= MAX_ROWS:
        raise SpecError(f"x is {x_BI.dtype} with {batch} rows: the kernels multiply 1 to {MAX_ROWS} rows of float16 or float32")
    tile_rows, tile_columns = len(trellis), trellis.shape[1] // spec.words_per_tile
    chosen = kernel(spec, x_BI, lut)
    if in_fragments and chosen != PTX:
        raise SpecError(f"rows of x are in fragments: the kernel for {x_BI.dtype} and code {spec.code} reads them as they are")
    if inputs != (-(-tile_columns // 2) * FRAGMENT_INPUTS if in_fragments else tile_columns * TILE):
        raise SpecError(f"x has {inputs} columns: this packed matrix multiplies {tile_columns * TILE}")
    chunk = chunk_of(tile_rows, tile_columns)
    splits = triton.cdiv(tile_columns, chunk * loop.WARP_PARTS)
    partial_SBO = x_BI.new_empty((splits, batch, tile_rows * TILE), dtype=torch.float32)
    if partial_SBO.numel() == 0:
        return partial_SBO
    table = portable.lut_for(spec, lut, trellis)
    words = trellis.contiguous().view(torch.uint32)
    if chosen == PTX:
        arguments = nvidia_arguments(spec, batch, _has_wide_table(x_BI.device))
        programs = triton.cdiv(tile_rows, arguments["WARPS"] // loop.WARP_PARTS * loop.WARP_ROWS)
        x = (x_BI if in_fragments else fragments(x_BI)).contiguous()
        operands = (x, words, table.view(torch.uint32), partial_SBO, tile_rows, tile_columns, chunk, batch)
        _nvidia_kernel[(programs, splits)](*operands, lane.UNIT.get(spec.code, 1.0), **arguments, num_warps=arguments["WARPS"])
    else:
        rows = triton.next_power_of_2(batch)
        decoder = astuple(portable.Decoder.of(spec))
        operands = (x_BI.contiguous(), words, table, partial_SBO, tile_rows, tile_columns, chunk * loop.WARP_PARTS, batch)
        _portable_kernel[(tile_rows, splits)](*operands, *decoder, rows, PORTABLE_TILES, num_warps=PORTABLE_WARPS)
    return partial_SBO


def matvec(x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T, float32 [B, O]: the sum of `partial_products`, with the same arguments."""
    return partial_products(x_BI, trellis, spec, lut).sum(0)


def chunk_of(tile_rows: int, tile_columns: int) -> int:
    """Tiles along the inputs that a warp takes: enough warps for a large GPU, whole trips of the loop."""
    warps = triton.cdiv(tile_rows, loop.WARP_ROWS) * loop.WARP_PARTS
    splits = min(triton.cdiv(WARPS_WANTED, warps), max(1, tile_columns // (MIN_CHUNK * loop.WARP_PARTS)))
    return triton.cdiv(triton.cdiv(tile_columns, splits * loop.WARP_PARTS), UNROLL) * UNROLL


@lru_cache(maxsize=16)
def _has_wide_table(device: torch.device) -> bool:
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_multiprocessor >= WIDE_SHARED_BYTES


@lru_cache(maxsize=256)
def nvidia_arguments(spec: TrellisSpec, batch: int, wide: bool = False) -> dict[str, object]:
    """The compile-time arguments of the NVIDIA kernel. wide: a table of the code may take 64 KiB of shared memory."""
    columns = 8 if batch <= 8 else 16
    has_table = spec.weights_per_step == 2
    # Of sixteen rows there are more sums, and with the registers that they take one program of sixteen warps less.
    wide = wide and has_table and columns == 8
    table, warps = (lane.WIDE_TABLE, WIDE_WARPS) if wide else (lane.SMALL_TABLE, WARPS)
    return {
        "MULTIPLY": loop.multiply(spec, columns, UNROLL, warps, table),
        "OPERANDS": loop.MULTIPLY_CONSTRAINTS,
        "FIND": table.find(),
        "STORE": table.store(),
        "COPIES": table.copies if has_table else 0,
        "WORDS": spec.words_per_tile,
        "LANE_BITS": lane.lane_bits(spec),
        "GROUPS": columns // 8,
        "WARPS": warps,
        "UNROLL": UNROLL,
    }


def compile_cases() -> Iterator[CompileCase]:
    """Every code at 2 bits, rates with other windows, sixteen columns; and the portable kernel, for compiling.py."""
    signature = {"x_ptr": "*fp16", "trellis_ptr": "*u32", "lut_ptr": "*u32", "partial_ptr": "*fp32"}
    signature |= dict.fromkeys(("tile_rows", "tile_columns", "chunk", "batch"), "i32")
    pointers = ("x_ptr", "trellis_ptr", "lut_ptr", "partial_ptr")
    at_two_bits = [(code, 2, 1) for code in ("1mad", "mul1", "3inst", "mcg", "hyb", "hyb2")]
    others = [("3inst", 3, 1), ("mul1", 4, 1), ("hyb", 2.5, 1), ("hyb", 4, 1), ("hyb", 2, 16)]
    narrow = [(*each, False) for each in at_two_bits + others]
    for code, bits, batch, wide in (*narrow, ("hyb", 2, 1, True), ("hyb2", 2, 1, True)):
        spec = TrellisSpec.at_bits(code, bits)
        arguments = nvidia_arguments(spec, batch, wide)
        yield CompileCase(
            f"matvec ptx {code} {bits:g}, batch {batch}{', wide table' if wide else ''}",
            _nvidia_kernel,
            signature | {"unit": "fp32"},
            arguments,
            arguments["WARPS"],
            divisible=pointers,
            weights_per_thread=UNROLL * loop.WARP_ROWS * lane.LANE_WEIGHTS,
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
