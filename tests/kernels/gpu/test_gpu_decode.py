"""The GPU decoder against the definition. Tolerance: none, nothing is summed."""

import pytest
import torch
from random_packed import RAGGED, SPECS, name, packed, table

from qtipcli_kernels import codes
from qtipcli_kernels.decode import gpu, reference
from qtipcli_kernels.device import DeviceError
from qtipcli_kernels.spec import CODE_WEIGHTS_PER_STEP, MAX_BITS_PER_STEP, SpecError, TrellisSpec

EVERY_RATE = [
    TrellisSpec(code, bits_per_step, 16 if bits_per_step % 2 else 12, weights_per_step)
    for code, several in CODE_WEIGHTS_PER_STEP.items()
    for weights_per_step in several
    for bits_per_step in range(weights_per_step, MAX_BITS_PER_STEP + 1)
]


def on(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize("spec", EVERY_RATE, ids=name)
def test_every_code_at_every_rate_is_the_references(spec, device):
    trellis, lut = on(device, packed(spec, 32, 112), table(spec))
    assert torch.equal(gpu.decode(trellis, spec, lut).cpu(), reference.decode(trellis.cpu(), spec, table(spec)))


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16), RAGGED, (0, 64), (64, 0)])
def test_every_number_of_tiles(shape, device):
    spec = TrellisSpec("3inst", 3)
    (trellis,) = on(device, packed(spec, *shape))
    assert torch.equal(gpu.decode(trellis, spec).cpu(), reference.decode(trellis.cpu(), spec))


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_half_precision_is_the_definition_rounded_once(spec, device, half_dtypes):
    trellis, lut = on(device, packed(spec, 32, 64), table(spec))
    for dtype in half_dtypes:
        expected = reference.decode(trellis.cpu(), spec, table(spec)).to(dtype)
        assert torch.equal(gpu.decode(trellis, spec, lut, dtype).cpu(), expected)


def test_a_float32_table_is_not_rounded(device):
    spec = TrellisSpec("hyb", 4)
    lut = codes.default_lut(spec).float() + 1e-5
    trellis = packed(spec, 16, 32)
    found = gpu.decode(trellis.to(device), spec, lut.to(device))
    assert torch.equal(found.cpu(), reference.decode(trellis, spec, lut))


def test_strips_are_the_matrix(device):
    spec = TrellisSpec("hyb2", 3)
    trellis, lut = on(device, packed(spec, 80, 48), table(spec))
    whole = torch.full((80, 48), torch.nan)
    for outputs, strip in gpu.strips(trellis, spec, lut, 2):
        whole[outputs] = strip.cpu()
    assert torch.equal(whole, reference.decode(trellis.cpu(), spec, table(spec)))


def test_a_large_matrix_on_a_gpu(device):
    """Every state of every code many times over: 10^7 weights, where there is a GPU to do it."""
    if device == "cpu":
        pytest.skip("the interpreter would take hours")
    for spec in SPECS:
        trellis, lut = on(device, packed(spec, 2048, 4096), table(spec))
        assert torch.equal(gpu.decode(trellis, spec, lut), reference.decode(trellis, spec, lut))


def test_what_does_not_fit_is_refused(device, monkeypatch):
    spec = TrellisSpec("hyb", 4)
    trellis = packed(spec, 32, 32).to(device)
    with pytest.raises(SpecError, match=r"\(512, 2\)"):
        gpu.decode(trellis, spec, torch.zeros(3, 2, device=device))
    with pytest.raises(SpecError, match=r"torch\.float64"):
        gpu.decode(trellis, spec, table(spec).double().to(device))
    monkeypatch.setattr("qtipcli_kernels.device.INTERPRETED", False)
    with pytest.raises(DeviceError, match="no Triton kernel for cpu: Triton compiles for GPUs only"):
        gpu.decode(trellis.cpu(), spec)
