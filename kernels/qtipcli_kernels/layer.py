"""Owns a packed layer's whole computation on a GPU, without gradients: input transform, product, output transforms.

Three launches for all the layers that share an input, four where their outputs differ in size (grouped-query attention).
Dimension key: B rows, I inputs, P padded inputs, O outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qtipcli_kernels.decode import gpu as decode_gpu
from qtipcli_kernels.hadamard import gpu as hadamard_gpu
from qtipcli_kernels.matvec import gpu as matvec_gpu
from qtipcli_kernels.spec import TILE, TrellisSpec

FUSED_ROWS = 4 * matvec_gpu.MAX_ROWS
"""Most rows of x that the fused kernel multiplies, sixteen at a time; for more, the matrix is decoded and a library multiplies.

H200, 2 bits, 8192 x 28672, hyb, microseconds, fused / decoded: 32 rows 161 / 338, 64 rows 318 / 343, 96 rows 475 / 347
(docs/benchmarks/gpu.md).
"""

PORTABLE_ROWS = 2
"""The same for the kernel that is plain Triton. There, code lut: 1 row 459 / 607, 2 rows 584 / 610, 4 rows 943 / 610."""

STRIP_WEIGHTS = 1 << 26
"""Weights decoded at a time for the library's product: 128 MiB of fp16, its memory bound."""


@dataclass(frozen=True, slots=True)
class OutputSide:
    """What a layer does with its part of the product.

    padded: columns of the product. block: of the transform. scale: floating [O]. bias: floating [O] or None.
    """

    padded: int
    block: int
    scale: torch.Tensor
    bias: torch.Tensor | None


def packed_linear(
    x_BI: torch.Tensor,
    scale_in_I: torch.Tensor,
    block_in: int,
    trellis: torch.Tensor,
    spec: TrellisSpec,
    lut: torch.Tensor | None,
    outputs: Sequence[OutputSide],
) -> torch.Tensor:
    """What each layer makes of x, [B, O] in x's dtype: one behind the other in one dimension.

    x_BI: fp16, bf16 or float32. trellis: the layers' packed matrices one below the other, int32 [sum of P_out/16, P/16 * W].
    The rotated rows are rounded to fp16, as an fp16 product's are; sums and transforms are float32.
    """
    padded_in = trellis.shape[1] // spec.words_per_tile * TILE
    # The product's own order, where its kernel reads that; its rows are fp16, whatever x is.
    in_fragments = len(x_BI) <= FUSED_ROWS and matvec_gpu.kernel(spec, x_BI, lut, torch.float16) == matvec_gpu.PTX
    rotated_BP, row_scale_B = hadamard_gpu.rotate_in(x_BI, scale_in_I, padded_in, block_in, in_fragments)
    product_SBO = products(rotated_BP, trellis, spec, lut, in_fragments)
    layers, first = [], 0
    for side in outputs:
        layers.append((first, side.padded, side.block, side.scale, side.bias))
        first += side.padded
    return hadamard_gpu.rotate_out_group(product_SBO, row_scale_B, layers, x_BI.dtype)


def products(
    x_BI: torch.Tensor, trellis: torch.Tensor, spec: TrellisSpec, lut: torch.Tensor | None, in_fragments: bool = False
) -> torch.Tensor:
    """x W^T for any number of rows, in parts, float32 [S, B, O]: their sum over S is the product.

    x_BI: float16 or float32. in_fragments: at most FUSED_ROWS of them, as `matvec.gpu.partial_products` takes them. S is 1
    where a library multiplies, which it does in x's dtype.
    """
    if len(x_BI) <= (FUSED_ROWS if matvec_gpu.kernel(spec, x_BI, lut) == matvec_gpu.PTX else PORTABLE_ROWS):
        pieces = [
            matvec_gpu.partial_products(piece, trellis, spec, lut, in_fragments) for piece in x_BI.split(matvec_gpu.MAX_ROWS)
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    product_BO = x_BI.new_empty((1, len(x_BI), len(trellis) * TILE), dtype=torch.float32)
    tile_rows = max(1, STRIP_WEIGHTS // (x_BI.shape[1] * TILE))
    for outputs, weight_OI in decode_gpu.strips(trellis, spec, lut, tile_rows, x_BI.dtype):
        product_BO[0, :, outputs] = x_BI @ weight_OI.T
    return product_BO
