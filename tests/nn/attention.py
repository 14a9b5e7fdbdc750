"""Packed layers that share their input, fused and one by one, and what the tests of fusion compare them by."""

import copy

import torch
from nn.random_layers import HYB_1_5, random_layer
from torch import nn

from qtipcli.nn.fused import fuse
from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.transform import Transform
from qtipcli_kernels.spec import TrellisSpec

INPUTS = 100
SIZES = {"q": 64, "k": 37, "v": 32}
NAMES = tuple(SIZES)


class Attention(nn.Module):
    """Three packed layers of one input, of odd sizes and different output sides, and one of another input."""

    def __init__(self, spec: TrellisSpec = HYB_1_5) -> None:
        super().__init__()
        for seed, (name, outputs) in enumerate(SIZES.items()):
            side = Transform("block") if name == "k" else Transform()
            layout = PackedLayout(INPUTS, outputs, spec, Transform("block"), side, bias=name != "v")
            self.add_module(name, random_layer(layout, seed))
        self.o = random_layer(PackedLayout(INPUTS, INPUTS, spec, Transform("block")), seed=9)
        share_input_side(self.q, self.k, self.v)

    def forward(self, x):
        h = x * 2
        return self.q(h), self.k(h), self.v(h)


def share_input_side(first: TrellisLinear, *others: TrellisLinear) -> None:
    """As if they had been rounded for one input."""
    for other in others:
        other.scale_in = copy.deepcopy(first.scale_in)
        other.lut = copy.deepcopy(first.lut)


def rows(count: int = 3, inputs: int = INPUTS) -> torch.Tensor:
    return torch.randn(count, inputs, generator=torch.Generator().manual_seed(1))


def pair(spec: TrellisSpec = HYB_1_5) -> tuple[Attention, Attention]:
    """(fused, the same one by one)."""
    model, plain = Attention(spec), Attention(spec)
    assert fuse(model) == [NAMES]
    return model, plain


def equal(found, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


ALL_AT_ONCE = [64 + 48 + 32]
ONE_BY_ONE = [64, 48, 32]
