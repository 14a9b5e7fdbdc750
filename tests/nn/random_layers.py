"""Random packed layers: any ring of bits is a walk, so that random words are valid weights."""

import torch

from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.linear import TrellisLinear
from qtipcli.quant.transform import Transform
from qtipcli_kernels.spec import TrellisSpec

HYB_1_5 = TrellisSpec("hyb", 3)
ONE_MAD_2 = TrellisSpec("1mad", 2)
MUL1_3_SHORT = TrellisSpec("mul1", 3, state_bits=12)
LUT_2 = TrellisSpec("lut", 4, state_bits=8, weights_per_step=2)

ODD = PackedLayout(100, 37, HYB_1_5, Transform("block"), Transform(), bias=True)
"""Neither side a multiple of 16, a different transform on each, a table and a bias."""


def fill(layer: TrellisLinear, seed: int = 0) -> TrellisLinear:
    """Give every tensor of `layer` seeded random contents, signs in the scales, outputs of the size of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    layout = layer.layout
    with torch.no_grad():
        layer.trellis.random_(-(2**31), 2**31 - 1, generator=generator)
        layer.scale_in.copy_(torch.randn(layout.in_features, generator=generator))
        layer.scale_out.copy_(torch.randn(layout.out_features, generator=generator) / layout.in_features**0.5)
        if layer.lut is not None:
            # Not the default table: any serves here, and HYB's takes seconds to make.
            layer.lut.normal_(generator=generator)
        if layer.bias is not None:
            layer.bias.normal_(generator=generator)
    return layer


def random_layer(layout: PackedLayout, seed: int = 0) -> TrellisLinear:
    """A filled TrellisLinear of `layout`, its bias in float32."""
    return fill(TrellisLinear(layout, dtype=torch.float32), seed)
