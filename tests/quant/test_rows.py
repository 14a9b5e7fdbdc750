"""Rows of different sizes, rounded as even ones. Oracle: the dense matrix that is stored, row by row against the original."""

import torch

from qtipcli.nn.embedding import TrellisEmbedding
from qtipcli.nn.layout import PackedLayout
from qtipcli.quant.matrix import RoundingSettings, round_group
from qtipcli.quant.rows import row_sizes, with_row_sizes
from qtipcli.quant.transform import Transform
from qtipcli_kernels.spec import TrellisSpec

SPEC = TrellisSpec("3inst", 4, state_bits=8)
ROWS = Transform("block", 16)


def row_errors(weight: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Relative error of each row after rounding it divided by its size."""
    settings = RoundingSettings(Transform(), 1e-3, refit=True, transform_out=ROWS)
    even = round_group({"e": weight / sizes[:, None]}, torch.eye(48), {"e": SPEC}, settings, {"e": None})["e"]
    packed = with_row_sizes(even, sizes)
    layer = TrellisEmbedding(PackedLayout(48, len(weight), SPEC, Transform(), ROWS, embedding=True), dtype=torch.float32)
    layer.trellis.data, layer.scale_in.data, layer.scale_out.data = packed.trellis, packed.scale_in, packed.scale_out
    return (layer.weight_dense() - weight).norm(dim=1) / weight.norm(dim=1)


def test_small_rows_keep_their_direction():
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.randn(90, 48, generator=generator) * torch.logspace(-2, 0, 90)[torch.randperm(90, generator=generator)][:, None]
    )
    plain, even = row_errors(weight, torch.ones(90)), row_errors(weight, row_sizes(weight))
    assert plain.max() > 0.9  # what is tested: beside large rows a small one drowns, and the refit takes it to nothing
    # 4 bits at L = 8: .012 of the power or so, thus .11 of the norm; single rows of 48 values scatter.
    assert even.max() < 0.25
    assert even.std() < 0.3 * even.mean()


def test_sizes_are_relative_and_a_row_of_zeros_stays_one():
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    assert torch.equal(row_sizes(weight), torch.tensor([2.5, 1.0, 0.5]))  # norms 5, 0, 1 over their mean 2
    assert torch.equal(row_sizes(torch.zeros(2, 3)), torch.ones(2))
    assert torch.equal(row_sizes(weight.to(torch.bfloat16)), row_sizes(weight))
    assert torch.isfinite(row_errors(torch.cat([torch.randn(16, 48), torch.zeros(2, 48)]), torch.ones(18))[:16]).all()
