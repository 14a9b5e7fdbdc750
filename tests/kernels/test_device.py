"""Where Triton's kernels run, and what is said where they do not."""

import builtins

import pytest
import torch

from qtipcli_kernels import device


@pytest.fixture
def fresh():
    yield
    device._without_triton.cache_clear()
    device._unfit_gpu.cache_clear()


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    """As in a process that does not interpret."""
    monkeypatch.setattr(device, "INTERPRETED", False)


def test_a_cpu_tensor_is_refused_with_the_remedy():
    with pytest.raises(device.DeviceError, match=r"no Triton kernel for cpu: .* call qtipcli_kernels\.dispatch"):
        device.check(x=torch.zeros(1))


def test_tensors_on_two_devices_are_named():
    with pytest.raises(device.DeviceError, match="x on cpu, trellis on meta"):
        device.check(x=torch.zeros(1), trellis=torch.zeros(1, device="meta"), lut=None)


def test_an_old_triton_is_named(monkeypatch, fresh):
    import triton

    device._without_triton.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.1.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.why_not("cuda:0") == "Triton 3.1.0 is too old: 3.2 or newer is needed"


def test_an_absent_triton_is_named(monkeypatch, fresh):
    device._without_triton.cache_clear()
    original = builtins.__import__

    def without(name, *arguments):
        if name == "triton":
            raise ImportError(name)
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.why_not("cuda:0") == "Triton is not installed (pip install triton)"


def test_no_gpu_and_other_devices_are_named():
    if not torch.cuda.is_available():
        assert device.why_not("cuda") == "torch sees no GPU"
    assert "device type xpu" in device.why_not("xpu")
