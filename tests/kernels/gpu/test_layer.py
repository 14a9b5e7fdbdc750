"""A packed layer's whole computation on a GPU against the definition in float64.

Tolerance: the rotated rows are rounded to fp16, so twice the error of the same computation with torch's fp16 product.
"""

import pytest
import torch
from random_packed import packed, table

from qtipcli_kernels import dispatch, layer
from qtipcli_kernels.decode import reference as decode_reference
from qtipcli_kernels.hadamard import reference as hadamard_reference
from qtipcli_kernels.spec import TrellisSpec


def sides(device, *sizes, bias=True):
    """Output sides of layers with so many outputs: padded to tiles, transforms over all, and over 16."""
    draw = torch.Generator().manual_seed(7)
    made = []
    for number, size in enumerate(sizes):
        padded = -(-size // 16) * 16
        scale = torch.randn(size, generator=draw).to(torch.float16)
        offset = torch.randn(size, generator=draw) if bias and number % 2 == 0 else None
        block = padded if number % 2 == 0 else 16
        made.append(layer.OutputSide(padded, block, scale.to(device), None if offset is None else offset.to(device)))
    return made


def definition(x, scale_in, block_in, trellis, spec, lut, outputs, half):
    """In float64 throughout; with `half`, the rotated rows and the weights are rounded to fp16, a power of two apart."""
    weight = decode_reference.decode(trellis.cpu(), spec, lut).double()
    padded = torch.nn.functional.pad(x.cpu().double() * scale_in.cpu().double(), (0, weight.shape[1] - x.shape[1]))
    rotated = hadamard_reference.hadamard(padded, block_in)
    if half:
        weight = weight.half().double()
        rotated = rotated.half().double()
    product, first, made = rotated @ weight.T, 0, []
    for side in outputs:
        part = hadamard_reference.hadamard(product[:, first : first + side.padded], side.block, transpose=True)
        y = part[:, : len(side.scale)] * side.scale.cpu().double()
        made.append(y if side.bias is None else y + side.bias.cpu().double())
        first += side.padded
    return made


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("spec", [TrellisSpec("3inst", 2), TrellisSpec("hyb", 4)], ids=lambda spec: spec.code)
def test_layers_that_share_an_input_are_what_they_are_alone(spec, rows, device, half_dtypes):
    for dtype in (*half_dtypes, torch.float32):
        check_layers(spec, rows, dtype, device)


def check_layers(spec, rows, dtype, device):
    lut = table(spec)
    outputs = sides(device, 64, 40, 64, 16, 64)
    trellis = packed(spec, sum(side.padded for side in outputs), 48).to(device)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 43, generator=draw).to(device, dtype)
    scale_in = torch.randn(43, generator=draw).to(torch.float16).to(device)
    on_device = None if lut is None else lut.to(device)
    # By the custom op, which refuses what a function may return: two of the layers are alike and take one launch.
    given = [(side.padded, side.block, side.scale, side.bias) for side in outputs]
    found = dispatch.packed_linear(x, scale_in, 48, trellis, spec, on_device, given)
    exact = definition(x, scale_in, 48, trellis, spec, lut, outputs, half=False)
    plain = definition(x, scale_in, 48, trellis, spec, lut, outputs, half=True)
    for y, wanted, rounded in zip(found, exact, plain, strict=True):
        assert y.dtype == dtype and y.shape == wanted.shape
        assert (y.cpu() - wanted).norm() <= 2 * (rounded.to(dtype) - wanted).norm()


def test_many_rows_go_sixteen_at_a_time_then_to_the_library(device, monkeypatch):
    """Every way gives the product; which one is taken is seen from the number of parts."""
    spec = TrellisSpec("1mad", 2)
    monkeypatch.setattr(layer.matvec_gpu, "MIN_CHUNK", 4)
    monkeypatch.setattr(layer, "STRIP_WEIGHTS", 16 * 512)
    monkeypatch.setattr(layer, "PORTABLE_ROWS", layer.FUSED_ROWS)
    trellis = packed(spec, 32, 512).to(device)
    weight = decode_reference.decode(trellis.cpu(), spec).double()
    for rows, parts in ((16, 2), (18, 2), (layer.FUSED_ROWS + 1, 1)):
        x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).to(device, torch.float16)
        products = layer.products(x, trellis, spec, None)
        assert products.shape == (parts, rows, 32)
        exact = x.cpu().double() @ weight.T
        plain = x.cpu() @ weight.half().T
        assert (products.sum(0).cpu() - exact).norm() <= 2 * (plain - exact).norm()


def test_rows_larger_than_fp16_and_rows_of_nothing(device):
    spec = TrellisSpec("mul1", 3)
    outputs = sides(device, 32, bias=False)
    trellis = packed(spec, 32, 64).to(device)
    scale_in = torch.ones(64, dtype=torch.float16, device=device)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([[2.0**27], [0], [2.0**-27]])
    y = layer.packed_linear((x * scales).to(device), scale_in, 64, trellis, spec, None, outputs).view(3, 32)
    plain = layer.packed_linear(x.to(device), scale_in, 64, trellis, spec, None, outputs).view(3, 32)
    # Powers of two change no digit.
    assert torch.equal(y.cpu(), plain.cpu() * scales)
    # Nor do many rows overflow, which a library multiplies in fp16: inputs that all add up in an output, the worst there are.
    weight = decode_reference.decode(trellis.cpu(), spec)
    worst = hadamard_reference.hadamard(weight.sign()[:1], 64, transpose=True) * 2.0**27
    y = layer.packed_linear(worst.repeat(layer.FUSED_ROWS + 1, 1).to(device), scale_in, 64, trellis, spec, None, outputs)
    assert y.isfinite().all()
