"""Random packed matrices and tables for the kernel tests, always the same ones."""

import torch

from qtipcli_kernels import codes, packing
from qtipcli_kernels.spec import TrellisSpec

SPECS = (
    TrellisSpec("1mad", 2),
    TrellisSpec("mul1", 3, 12),
    TrellisSpec("3inst", 2),
    TrellisSpec("mcg", 5, 11),
    TrellisSpec("hyb", 4),
    TrellisSpec("hyb", 3, 13),
    TrellisSpec("hyb2", 5),
    TrellisSpec("lut", 1, 8),
    TrellisSpec("lut", 8, 16, 2),
)
"""Every code, even and odd bits per step, both numbers of weights per step, short and long states."""

RAGGED = (336, 272)
"""Outputs and inputs: 21 x 17 tiles, so that sixteen tiles at a time leave a remainder both ways."""


def packed(spec: TrellisSpec, outputs: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """A packed matrix of random bits: every ring of the right length is a walk."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, packing.trellis_shape(outputs, inputs, spec), dtype=torch.int64, generator=draw)
    return words.to(torch.int32)


def table(spec: TrellisSpec) -> torch.Tensor | None:
    """A random fp16 table for the codes that read one: what is in it is not the kernels' business."""
    shape = codes.lut_shape(spec)
    return None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float16)


def x_rows(batch: int, inputs: int) -> torch.Tensor:
    """float32 [batch, inputs] of N(0, 1)."""
    return torch.randn(batch, inputs, generator=torch.Generator().manual_seed(2))


def name(spec: TrellisSpec) -> str:
    """A test's id."""
    return f"{spec.code}-kV{spec.bits_per_step}-L{spec.state_bits}-V{spec.weights_per_step}"
