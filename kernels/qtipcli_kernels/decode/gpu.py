"""Owns decoding on a GPU: a packed matrix -> its weights in memory, for products with so many rows that a library's win."""

from collections.abc import Iterator
from dataclasses import astuple

import torch
import triton
import triton.language as tl

from qtipcli_kernels import device, portable
from qtipcli_kernels.compiling import CompileCase
from qtipcli_kernels.spec import TILE, TrellisSpec

TILES = 4
"""Tiles a program decodes side by side: rows of 64 fp16, whole memory lines."""

WARPS = 4


@triton.jit
def _decode_kernel(
    trellis_ptr,
    lut_ptr,
    weight_ptr,
    tile_columns,
    KIND: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    INCREMENT: tl.constexpr,
    L: tl.constexpr,
    KV: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
    TILES: tl.constexpr,
):
    tile_row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * TILES
    tile = column + tl.arange(0, TILES)[:, None, None]
    ring = trellis_ptr + (tile_row * tile_columns + tile) * WORDS
    value = portable.weights(
        ring, lut_ptr, tile < tile_columns, KIND, MULTIPLIER, INCREMENT, L, KV, V, WORDS, LANE_BITS
    )  # fmt: skip
    # [tile, 8 g, 4 c, column half, row half, parity] -> [row half, g, tile, column half, c, parity]: rows of the matrix, so
    # that what is written is contiguous.
    value = value.reshape(TILES, 8, 4, 2, 2, 2).permute(4, 1, 0, 3, 2, 5).reshape(16, TILES * 16)
    row = tile_row * 16 + tl.arange(0, 16)[:, None]
    position = column * 16 + tl.arange(0, TILES * 16)[None, :]
    width = tile_columns * 16
    out = value.to(weight_ptr.dtype.element_ty)
    tl.store(weight_ptr + row * width + position, out, mask=position < width)


def decode(
    trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weights that a packed matrix stands for, [O, I] in `dtype`.

    trellis: int32 [O/16, I/16 * W], on a GPU. lut: float16 or float32, the code's table, its default where None.
    dtype: float32 gives `reference.decode` bit for bit; float16 and bfloat16 are that, rounded. Raises DeviceError, SpecError.
    """
    device.check(trellis=trellis, lut=lut)
    tile_rows, words = trellis.shape
    tile_columns = words // spec.words_per_tile
    weight_OI = trellis.new_empty((tile_rows * TILE, tile_columns * TILE), dtype=dtype)
    if weight_OI.numel() == 0:
        return weight_OI
    trellis = trellis.contiguous()
    _decode_kernel[(triton.cdiv(tile_columns, TILES), tile_rows)](
        trellis.view(torch.uint32),
        portable.lut_for(spec, lut, trellis),
        weight_OI,
        tile_columns,
        *astuple(portable.Decoder.of(spec)),
        TILES=TILES,
        num_warps=WARPS,
    )
    return weight_OI


def strips(
    trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None, tile_rows: int, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Decode `tile_rows` rows of tiles at a time: yields (the outputs they are, `dtype` [outputs, I]), top to bottom."""
    for first in range(0, len(trellis), tile_rows):
        part = trellis[first : first + tile_rows]
        yield slice(first * TILE, (first + len(part)) * TILE), decode(part, spec, lut, dtype)


def compile_cases() -> Iterator[CompileCase]:
    """One of each family of codes, for compiling.py."""
    for code, bits in (("1mad", 2), ("3inst", 3), ("hyb", 4), ("lut", 2)):
        spec = TrellisSpec(code, bits)
        yield CompileCase(
            f"decode {code} {spec.bits:g}",
            _decode_kernel,
            {"trellis_ptr": "*u32", "lut_ptr": "*fp16", "weight_ptr": "*fp16", "tile_columns": "i32"},
            portable.constexprs(_decode_kernel, (*astuple(portable.Decoder.of(spec)), TILES)),
            WARPS,
            divisible=("trellis_ptr", "lut_ptr", "weight_ptr"),
        )
