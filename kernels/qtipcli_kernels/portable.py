"""Owns the decoder in plain Triton: a lane's windows and the codes' arithmetic, for AMD GPUs, the interpreter and large tables.

The twin of lane.py, with the same eight weights of a tile to a lane: tensors [tiles, 32 lanes, 8 weights] in the walk's order.
Bit for bit what codes.values gives. Letters: L state bits, kV bits a step, V weights a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qtipcli_kernels import codes, lane
from qtipcli_kernels.spec import HYB_INDEX_BITS, SpecError, TrellisSpec

BYTE_SUM, HALF_PAIR, HYBRID, TABLE = (tl.constexpr(kind) for kind in range(4))

_LUT_SHIFT = tl.constexpr(15 - HYB_INDEX_BITS)
_LUT_MASK = tl.constexpr((1 << HYB_INDEX_BITS) - 1)
_HALF_MASK, _HALF_XOR = tl.constexpr(codes.HALF_PAIR_MASK), tl.constexpr(codes.HALF_PAIR_XOR)
_BYTE_MEAN, _BYTE_UNIT = tl.constexpr(codes.BYTE_SUM_MEAN), tl.constexpr(codes.BYTE_SUM_INVERSE_DEVIATION)

_ARITHMETIC = {
    "1mad": (BYTE_SUM.value, codes.ONE_MAD_MULTIPLIER, codes.ONE_MAD_INCREMENT),
    "mul1": (BYTE_SUM.value, codes.MUL1_MULTIPLIER, 0),
    "3inst": (HALF_PAIR.value, codes.THREE_INST_MULTIPLIER, codes.THREE_INST_INCREMENT),
    "mcg": (HALF_PAIR.value, codes.MCG_MULTIPLIER, 0),
    "hyb": (HYBRID.value, 0x8000, 0),
    "hyb2": (HYBRID.value, 0x8000_8000, 0),
    "lut": (TABLE.value, 0, 0),
}


@dataclass(frozen=True, slots=True)
class Decoder:
    """The compile-time arguments of `weights`, in its order.

    kind: the family of codes. multiplier, increment: of its linear congruence; HYB has the mask of its signs as multiplier.
    """

    kind: int
    multiplier: int
    increment: int
    state_bits: int
    bits_per_step: int
    weights_per_step: int
    words: int
    lane_bits: int

    @classmethod
    def of(cls, spec: TrellisSpec) -> "Decoder":
        steps = spec.state_bits, spec.bits_per_step, spec.weights_per_step
        return cls(*_ARITHMETIC[spec.code], *steps, spec.words_per_tile, lane.lane_bits(spec))


def lut_for(spec: TrellisSpec, lut: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The table that a kernel reads, contiguous and on the device of `like`; `like` itself for a code that computes.

    Raises SpecError where its shape is not the code's.
    """
    if codes.lut_shape(spec) is None:
        return like
    table = codes.checked_lut(spec, lut)
    if table.dtype not in (torch.float16, torch.float32):
        raise SpecError(f"the table of code {spec.code} is {table.dtype}: the kernels read float16 and float32")
    return table.to(like.device).contiguous()


def constexprs(kernel: Any, values: Sequence[object]) -> dict[str, object]:
    """The last arguments of `kernel` by name, for a compile case."""
    return dict(zip(kernel.arg_names[-len(values) :], values, strict=True))


@triton.jit
def weights(
    ring_ptr,
    lut_ptr,
    valid,
    KIND: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    INCREMENT: tl.constexpr,
    L: tl.constexpr,
    KV: tl.constexpr,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    LANE_BITS: tl.constexpr,
):
    """float32 [N, 32, 8]: the weights of N tiles.

    ring_ptr: uint32 pointers [N, 1, 1] to the tiles' first words. valid: int1 [N, 1, 1]; a tile that is not reads as zeros.
    lut_ptr: float16 or float32, HYB [512, 2] or [2^L, V]. The rest: the fields of `Decoder`.
    """
    STEPS: tl.constexpr = 8 // V
    lane_id = tl.arange(0, 32)[None, :, None]
    start = lane_id * LANE_BITS + tl.arange(0, STEPS)[None, None, :] * KV
    word = start >> 5
    first = tl.load(ring_ptr + word % WORDS, mask=valid, other=0)
    second = tl.load(ring_ptr + (word + 1) % WORDS, mask=valid, other=0)
    pair = (first.to(tl.uint64) << 32) | second.to(tl.uint64)
    state = ((pair >> (64 - L - (start & 31)).to(tl.uint64)) & ((1 << L) - 1)).to(tl.uint32)
    if KIND == BYTE_SUM:
        value = _byte_sum(state * MULTIPLIER + INCREMENT)
    elif KIND == HALF_PAIR:
        value = _half_pair(state * MULTIPLIER + INCREMENT)
    elif KIND == HYBRID:
        value = _hybrid(state, lut_ptr, MULTIPLIER)
    elif V == 1:
        value = tl.load(lut_ptr + state).to(tl.float32)
    else:
        value = tl.join(tl.load(lut_ptr + state * 2), tl.load(lut_ptr + state * 2 + 1)).to(tl.float32)
    return value.reshape(value.shape[0], 32, 8)


@triton.jit
def _byte_sum(x):
    halves = (x & 0x00FF00FF) + ((x >> 8) & 0x00FF00FF)
    return (((halves & 0xFFFF) + (halves >> 16)).to(tl.float32) - _BYTE_MEAN) * _BYTE_UNIT


@triton.jit
def _half_pair(x):
    x = (x & _HALF_MASK) ^ _HALF_XOR
    high = (x >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    low = (x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    # One fp16 addition, rounded to fp16.
    return (high + low).to(tl.float32)


@triton.jit
def _hybrid(state, lut_ptr, SIGNS: tl.constexpr):
    h = state * state + state
    entry = (h >> _LUT_SHIFT) & _LUT_MASK
    low = tl.load(lut_ptr + entry * 2).to(tl.float32)
    high = tl.load(lut_ptr + entry * 2 + 1).to(tl.float32)
    signs = h & SIGNS
    low = tl.where((signs & 0x8000) != 0, -low, low)
    high = tl.where((signs >> 31) != 0, -high, high)
    return tl.join(low, high)


@triton.jit
def column_in_tile():
    """int32 [1, 32, 8]: the tile's column that each lane's each weight lies in."""
    weight = tl.arange(0, 8)[None, None, :]
    return (tl.arange(0, 32)[None, :, None] & 3) * 2 + (weight & 1) + (weight >> 2) * 8
