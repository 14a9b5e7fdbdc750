"""Owns TrellisLinear: a linear layer that computes from packed weights.

Dimension key: I inputs, O outputs, both as the model sees them; padded, they are whole tiles of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from qtipcli.nn.layout import PackedLayout
from qtipcli.nn.module import PackedModule
from qtipcli_kernels import dispatch

if TYPE_CHECKING:
    from qtipcli.nn.fused import FusedGroup


class TrellisLinear(PackedModule):
    """y = scale_out * H_out^T(W~ H_in(pad(scale_in * x)))[:O] + bias, with W~ decoded from the trellis on the fly.

    Source: QuIP# (arXiv 2402.04396) Algorithm 2 for the transforms, QTIP (arXiv 2406.11235) section 3 for W~.

    Args and parameters: those of PackedModule, whose matrix is the weight, y = x @ weight^T + bias.
    """

    def __init__(
        self, layout: PackedLayout, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(layout, device, dtype)
        self.group: FusedGroup | None = None
        self.slot = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: floating [..., I]. Returns [..., O] in x's dtype, computed in float32. Differentiable in x and all parameters."""
        group = self.group
        part = None if group is None else group.part(self, x)
        return packed_linear(x, (self,), self.trellis)[0] if part is None else part

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", fused with {len(self.group.layers) - 1}" if self.group else "")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TrellisLinear:
        super()._apply(fn, recurse)
        if self.group is not None:
            self.group.relink()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # What is loaded need not be equal among the layers of a group.
        if self.group is not None:
            self.group.dissolve()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a layer by itself, without those that it is fused with and their part of the memory."""
        state = self.__dict__ | {"group": None, "slot": 0}
        if self.group is not None:
            own = nn.Parameter(self.trellis.detach().clone(), requires_grad=False)
            state["_parameters"] = self._parameters | {"trellis": own}
        return state


def packed_linear(x: torch.Tensor, layers: Sequence[PackedModule], trellis: torch.Tensor) -> list[torch.Tensor]:
    """What each of `layers` makes of x: input side and product once for all, then each layer's output side.

    The one place where packed layers compute, alone or fused. x: floating [..., I]. layers: equal in in_features, spec,
    transform_in, scale_in and lut, which are read from the first. trellis: their packed matrices one below the other,
    int32 [sum of O/16, I/16 * W]. Returns [..., O] for each, in x's dtype, computed in float32.
    """
    first = layers[0]
    if dispatch.implementation(x.device) == dispatch.TRITON and not _gradients_wanted(x, layers):
        return _on_gpu(x, layers, trellis)
    product = dispatch.matvec(_input_side(x, first), trellis, first.layout.spec, first.lut)
    parts = product.split([layer.layout.padded_out for layer in layers], dim=-1)
    return [_output_side(part, layer).to(x.dtype) for part, layer in zip(parts, layers, strict=True)]


def _gradients_wanted(x: torch.Tensor, layers: Sequence[PackedModule]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(own.requires_grad for layer in layers for own in layer.parameters())


def _on_gpu(x: torch.Tensor, layers: Sequence[PackedModule], trellis: torch.Tensor) -> list[torch.Tensor]:
    """`packed_linear` in three launches; the rotated x is rounded to fp16, whatever x is."""
    first = layers[0]
    layout = first.layout
    outputs = [(each.layout.padded_out, each.layout.block_out, each.scale_out, each.bias) for each in layers]
    floating = x if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x.to(torch.float32)
    ys = dispatch.packed_linear(floating, first.scale_in, layout.block_in, trellis, layout.spec, first.lut, outputs)
    return [y.to(x.dtype) for y in ys]


def _input_side(x: torch.Tensor, layer: PackedModule) -> torch.Tensor:
    """Scaled, padded and turned: [..., I] -> float32 [..., padded I]."""
    layout = layer.layout
    scaled = x.to(torch.float32) * layer.scale_in.to(torch.float32)
    return dispatch.hadamard(functional.pad(scaled, (0, layout.padded_in - layout.in_features)), layout.block_in)


def _output_side(product: torch.Tensor, layer: PackedModule) -> torch.Tensor:
    """Turned back, cut and scaled, with the bias added: float32 [..., padded O] -> float32 [..., O]."""
    layout = layer.layout
    y = dispatch.hadamard(product, layout.block_out, transpose=True)[..., : layout.out_features]
    y = y * layer.scale_out.to(torch.float32)
    return y if layer.bias is None else y + layer.bias.to(torch.float32)
