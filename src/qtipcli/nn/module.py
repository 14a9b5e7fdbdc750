"""Owns PackedModule: the parameters that every packed module has, how they move, and the plain matrix that they stand for.

Dimension key: I inputs, O outputs, both as the model sees them; padded, they are whole tiles of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from qtipcli.nn.layout import PackedLayout
from qtipcli_kernels import dispatch

EXACT = ("scale_in", "scale_out", "lut")
"""Parameters that keep the numbers on disk whatever dtype the model is cast to."""

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class PackedModule(nn.Module):
    """A packed matrix A [O, I], of which subclasses make a linear or an embedding.

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
        # First: transformers takes the dtype of a model from its first floating parameter, which may be an embedding's.
        self.weight = frozen((0,), floating)
        self.trellis = frozen(layout.trellis_shape, torch.int32)
        self.scale_in = frozen((layout.in_features,), torch.float16, 1)
        self.scale_out = frozen((layout.out_features,), torch.float16, 1)
        self.lut = frozen(layout.lut_shape, torch.float16) if layout.lut_shape else None
        self.bias = frozen((layout.out_features,), floating) if layout.bias else None

    @torch.no_grad()
    def weight_dense(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [O, I] that the module stands for; computed in float32, returned in `dtype`."""
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
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        """Move with the model, but never round: `model.to(torch.bfloat16)` must not take three bits from every scale.

        torch casts floating tensors only, so that the same bits seen as integers are moved and left as they are.
        """
        exact = [parameter for name in EXACT if (parameter := getattr(self, name)) is not None]

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if any(tensor is parameter for parameter in exact):
                return fn(tensor.view(INTEGER_OF_SIZE[tensor.element_size()])).view(tensor.dtype)
            return fn(tensor)

        return super()._apply(move, recurse)
