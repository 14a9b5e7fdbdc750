"""Owns TunedLinear: a packed layer as it is trained, its walks decoded once and its scales in float32.

Dimension key: I inputs, O outputs, both as the model sees them.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from qtipcli.nn.linear import TrellisLinear
from qtipcli_kernels import dispatch


class TunedLinear(nn.Module):
    """y = scale_out * (C (scale_in * x)) + bias, with the core C = (H_out^T W~ H_in)[:O, :I] held as a plain matrix.

    The trellis is fixed while scales are trained, so C is computed once; only a table that is trained (`trains_lut`) makes it
    anew in every call, through the decoder's own gradient. Source of the formula: docs/format.md, section 3.

    Args:
        layer: the packed layer; its parameters are copied, its trellis is shared.
        trains_lut: whether the table, if there is one, asks for a gradient.
        dtype: of C where it is held; products are taken in x's dtype or wider.

    Parameters: scale_in float32 [I], scale_out float32 [O], lut float32 or None, bias float32 [O] or None.
    """

    def __init__(self, layer: TrellisLinear, trains_lut: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layout = layer.layout
        self.scale_in = nn.Parameter(layer.scale_in.detach().float().clone())
        self.scale_out = nn.Parameter(layer.scale_out.detach().float().clone())
        self.lut = None if layer.lut is None else nn.Parameter(layer.lut.detach().float().clone(), requires_grad=trains_lut)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        self.weight = layer.weight  # empty: code that asks a layer for its weight's dtype or device gets the model's
        self.trellis = layer.trellis.detach()
        with torch.no_grad():
            self.core_OI = None if trains_lut and self.lut is not None else self._core().to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: floating [..., I]. Returns [..., O] in x's dtype."""
        core_OI = self._core() if self.core_OI is None else self.core_OI
        scaled = x.to(torch.float32) * self.scale_in
        y = functional.linear(scaled, core_OI.to(torch.float32)) * self.scale_out
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _core(self) -> torch.Tensor:
        layout = self.layout
        decoded = dispatch.decode(self.trellis, layout.spec, self.lut)
        turned = dispatch.hadamard(decoded, layout.block_in, transpose=True)[:, : layout.in_features]
        turned = dispatch.hadamard(turned.T.contiguous(), layout.block_out, transpose=True)
        return turned.T[: layout.out_features].contiguous()
