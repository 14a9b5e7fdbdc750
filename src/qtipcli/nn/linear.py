"""Owns TrellisLinear: a linear layer that computes from packed weights, and the plain matrix that it stands for.

Dimension key: I inputs, O outputs, both as the model sees them; padded, they are whole tiles of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from qtipcli.nn.layout import PackedLayout
from qtipcli_kernels import dispatch

if TYPE_CHECKING:
    from qtipcli.nn.fused import FusedGroup

EXACT = ("scale_in", "scale_out", "lut")
"""Parameters that keep the numbers on disk whatever dtype the model is cast to."""

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TrellisLinear(nn.Module):
    """y = scale_out * H_out^T(W~ H_in(pad(scale_in * x)))[:O] + bias, with W~ decoded from the trellis on the fly.

    Source: QuIP# (arXiv 2402.04396) Algorithm 2 for the transforms, QTIP (arXiv 2406.11235) section 3 for W~.

    Args:
        layout: sizes, code and transforms.
        device, dtype: as in nn.Linear; dtype is that of `bias` and of the empty `weight`, the rest is fixed.

    Parameters, none of which asks for a gradient until a caller says so:
        trellis: int32 [O/16, I/16 * W].
        scale_in: fp16 [I]; scale_out: fp16 [O]. Random signs and channel scales in one.
        lut: fp16, for the codes that read a table.
        bias: [O], or None.
        weight: empty, so that a loader which does not know the format fails, and `layer.weight.dtype` is the model's.
    """

    def __init__(
        self, layout: PackedLayout, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.layout = layout
        self.in_features, self.out_features = layout.in_features, layout.out_features

        def frozen(shape: tuple[int, ...], kind: torch.dtype | None, fill: float = 0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, fill, device=device, dtype=kind), requires_grad=False)

        floating = dtype or torch.get_default_dtype()
        self.trellis = frozen(layout.trellis_shape, torch.int32)
        self.scale_in = frozen((layout.in_features,), torch.float16, 1)
        self.scale_out = frozen((layout.out_features,), torch.float16, 1)
        self.lut = frozen(layout.lut_shape, torch.float16) if layout.lut_shape else None
        self.weight = frozen((0,), floating)
        self.bias = frozen((layout.out_features,), floating) if layout.bias else None
        self.group: FusedGroup | None = None
        self.slot = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: floating [..., I]. Returns [..., O] in x's dtype, computed in float32. Differentiable in x and all parameters."""
        group = self.group
        part = None if group is None else group.part(self, x)
        return packed_linear(x, (self,), self.trellis)[0] if part is None else part

    @torch.no_grad()
    def weight_dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [O, I] that the layer stands for, y = x @ weight^T + bias; computed in float32, returned in `dtype`."""
        layout = self.layout
        decoded = dispatch.decode(self.trellis, layout.spec, self.lut)
        weight = dispatch.hadamard(decoded, layout.block_in, transpose=True)[:, : layout.in_features]
        weight = dispatch.hadamard(weight.T.contiguous(), layout.block_out, transpose=True).T[: layout.out_features]
        return (self.scale_out.to(torch.float32)[:, None] * weight * self.scale_in.to(torch.float32)).to(dtype).contiguous()

    def unfreeze(self, names: Iterable[str] = EXACT) -> dict[str, nn.Parameter]:
        """Put float32 copies that ask for a gradient in the place of the named parameters, and return them, to be trained.

        fp16 would lose small steps, and the sums that are the table's gradient can overflow it. Names that the layer has not
        are left out. The layer cannot be saved as packed any more: who trains it writes the tensors, in their stored dtypes.
        """
        masters = {name: nn.Parameter(own.detach().float()) for name in names if (own := getattr(self, name)) is not None}
        for name, master in masters.items():
            setattr(self, name, master)
        return masters

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"in_features={layout.in_features}, out_features={layout.out_features}, bias={layout.bias}, "
            f"code={layout.spec.code}, bits={layout.spec.bits:g}, state_bits={layout.spec.state_bits}, "
            f"transform_in={layout.transform_in}, transform_out={layout.transform_out}"
            + (f", fused with {len(self.group.layers) - 1}" if self.group else "")
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TrellisLinear:
        """Move with the model, but never round: `model.to(torch.bfloat16)` must not take three bits from every scale.

        torch casts floating tensors only, so that the same bits seen as integers are moved and left as they are.
        """
        exact = [parameter for name in EXACT if (parameter := getattr(self, name)) is not None]

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if any(tensor is parameter for parameter in exact):
                return fn(tensor.view(INTEGER_OF_SIZE[tensor.element_size()])).view(tensor.dtype)
            return fn(tensor)

        super()._apply(move, recurse)
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


def packed_linear(x: torch.Tensor, layers: Sequence[TrellisLinear], trellis: torch.Tensor) -> list[torch.Tensor]:
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


def _gradients_wanted(x: torch.Tensor, layers: Sequence[TrellisLinear]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(own.requires_grad for layer in layers for own in layer.parameters())


def _on_gpu(x: torch.Tensor, layers: Sequence[TrellisLinear], trellis: torch.Tensor) -> list[torch.Tensor]:
    """`packed_linear` in three launches; the rotated x is rounded to fp16, whatever x is."""
    first = layers[0]
    layout = first.layout
    outputs = [(each.layout.padded_out, each.layout.block_out, each.scale_out, each.bias) for each in layers]
    floating = x if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x.to(torch.float32)
    ys = dispatch.packed_linear(floating, first.scale_in, layout.block_in, trellis, layout.spec, first.lut, outputs)
    return [y.to(x.dtype) for y in ys]


def _input_side(x: torch.Tensor, layer: TrellisLinear) -> torch.Tensor:
    """Scaled, padded and turned: [..., I] -> float32 [..., padded I]."""
    layout = layer.layout
    scaled = x.to(torch.float32) * layer.scale_in.to(torch.float32)
    return dispatch.hadamard(functional.pad(scaled, (0, layout.padded_in - layout.in_features)), layout.block_in)


def _output_side(product: torch.Tensor, layer: TrellisLinear) -> torch.Tensor:
    """Turned back, cut and scaled, with the bias added: float32 [..., padded O] -> float32 [..., O]."""
    layout = layer.layout
    y = dispatch.hadamard(product, layout.block_out, transpose=True)[..., : layout.out_features]
    y = y * layer.scale_out.to(torch.float32)
    return y if layer.bias is None else y + layer.bias.to(torch.float32)
